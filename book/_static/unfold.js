// The theme lets the keyboard reach whatever scrolls, but looks for it only when the page loads and
// when the window changes: what has just been unfolded has to be looked at too.
document.addEventListener("click", (event) => {
  if (event.target.closest(".admonition-title, summary")) {
    window.dispatchEvent(new Event("resize"));
  }
});
