"""Options of benchmarks that adapt given source models of fundus photographs to other centres."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from examples.common.usage import UsageError, require, split_names
from examples.fundus.data import available_domains, check
from examples.fundus.validation import check_counts, check_training


@dataclass(frozen=True)
class SourceModels:
    """Data, source models, and where to compute."""

    data_root: str
    """Folder of the lists and images, or "synthetic"."""
    models: Path
    """Folder with the source models, SOURCE.pt or SOURCE/SOURCE.pt."""
    sources: str = ""
    """Centres of the source models, separated by commas; default all."""
    size: int = 128
    """Side of the square images, pixels."""
    width: int = 32
    """Channels of the network's first stage."""
    images: int | None = None
    """Images of each target to use; default all (synthetic: 100)."""
    seed: int = 0
    """Seed of all random numbers: augmentation, controls, bootstrap."""
    device: str = "auto"
    """Where to compute."""
    threads: int = 1
    """Threads of a CPU."""

    def settings(self) -> dict[str, object]:
        """What all results in one table must have in common."""
        return {"seed": self.seed, "size": self.size, "width": self.width, "images": self.images}

    def centres(self) -> tuple[list[str], list[str]]:
        """All centres, checked, and those of the source models.

        Raises:
            DataError: something is wrong with the data.
            UsageError: there is no centre of such a name, or a number is out of range.
        """
        check_counts(self.seed, self.threads)
        check_training(self.size, self.width)
        require(
            self.images is None or self.images >= 1, f"--images is {self.images}; choose at least 1"
        )
        domains = available_domains(self.data_root)
        sources = split_names("--sources", self.sources or ",".join(domains), domains)
        check(self.data_root, domains)
        return domains, sources

    def file_of(self, source: str) -> Path:
        """The file of a source model, MODELS/SOURCE.pt or MODELS/SOURCE/SOURCE.pt.

        Raises:
            UsageError: there is none; the message has the command that makes it.
        """
        places = (self.models / f"{source}.pt", self.models / source / f"{source}.pt")
        path = next((place for place in places if place.exists()), None)
        if path is None:
            raise UsageError(
                f"there is no source model {places[0]} or {places[1]}; train it by "
                f"python -m examples.fundus train --data-root {shlex.quote(self.data_root)} "
                f"--source {shlex.quote(source)} --size {self.size} --width {self.width} "
                f"--out {shlex.quote(str(self.models / source))}"
            )
        return path
