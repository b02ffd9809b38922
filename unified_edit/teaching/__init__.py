"""What readers of the book work with: checks of their exercises, and figures that they move."""
