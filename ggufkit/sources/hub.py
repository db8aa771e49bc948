"""Files of Hugging Face repositories, through huggingface_hub: its cache, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.

What a repository holds is listed first, the files wanted are chosen by name, and only those are fetched. Offline, or
where the server cannot be reached, the list is what the cache holds.
"""

from __future__ import annotations

import contextlib
import fnmatch
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ggufkit_formats.errors import GgufkitError

# what a repository is searched for, in this order, when no type is named
DEFAULT_TYPES = ("Q4_K_M", "Q8_0")

# companions of a checkpoint, at the top of the repository
COMPANIONS = (
    "config.json", "generation_config.json", "chat_template.json", "chat_template.jinja", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tekken.json",
)  # fmt: skip

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
# GGUF files that are no models: projectors of images, importance matrices, draft heads
_NO_MODEL = re.compile(r"(?:^|[-._/])(?:mmproj|imatrix|mtp)(?:[-._/]|$)", re.IGNORECASE)
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
_TYPE_IN_NAME = re.compile(
    r"(?:^|[-._/])(?:B?F16|F32|I?Q\d_\w+|T?Q\d_\w+|MXFP4\w*|NVFP4|NF4)(?:[-./]|$)", re.IGNORECASE
)


@dataclass(frozen=True)
class Listing:
    """The files of a repository; `folder` is the cached snapshot where they come from the cache."""

    repo: str
    files: tuple[str, ...]
    folder: Path | None = None


@dataclass(frozen=True)
class Model:
    """One model of a repository: a file, or the shards of one, by the name without the shard's number."""

    name: str
    files: tuple[str, ...]


def gguf_file(repo: str, kind: str = "") -> Path:
    """The local path of the repository's GGUF file of type `kind` (or of that file name); its first shard if split."""
    listing = _list(repo)
    chosen = choose(repo, models(listing), kind)
    paths = [_fetch(listing, name) for name in chosen.files]
    return paths[0]


def checkpoint_folder(repo: str) -> Path:
    """The local folder with the repository's config, safetensors and tokenizer files."""
    listing = _list(repo)
    top = {name for name in listing.files if "/" not in name}
    if "config.json" not in top:
        raise GgufkitError(f"hf:{repo}: holds no config.json{_holding(listing)}")
    names = [name for name in COMPANIONS if name in top] + sorted(fnmatch.filter(top, "*.tiktoken"))
    index = "model.safetensors.index.json"
    if index in top:
        weights = [index, *_shards(listing, _fetch(listing, index))]
    elif "model.safetensors" in top:
        weights = ["model.safetensors"]
    else:
        # Mistral's own consolidated files hold the same weights under other names
        weights = [n for n in sorted(top) if n.endswith(".safetensors") and not n.startswith("consolidated")]
    if not weights:
        raise GgufkitError(f"hf:{repo}: holds no safetensors files{_holding(listing)}")
    paths = [_fetch(listing, name) for name in (*names, *weights)]
    return paths[0].parent


def _shards(listing: Listing, index: Path) -> list[str]:
    """The files that the index names, each checked to be in the repository."""
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise GgufkitError(f"hf:{listing.repo}: {index.name} is not a safetensors index ({error})") from None
    missing = [str(name) for name in named if name not in listing.files]
    if missing:
        raise GgufkitError(f"hf:{listing.repo}: {index.name} names {missing[0]}, which is not there{_where(listing)}")
    return named


def models(listing: Listing) -> list[Model]:
    """The repository's GGUF models, shards joined, incomplete sets and projectors left out."""
    found: list[Model] = []
    sets: dict[tuple[str, int], dict[int, str]] = {}
    for name in sorted(listing.files):
        if not name.lower().endswith(".gguf") or _NO_MODEL.search(name):
            continue
        if shard := _SHARD.search(name):
            sets.setdefault((name[: shard.start()] + ".gguf", int(shard[2])), {})[int(shard[1])] = name
        else:
            found.append(Model(name, (name,)))
    for (name, count), shards in sets.items():
        if sorted(shards) == list(range(1, count + 1)):
            found.append(Model(name, tuple(shards[i] for i in sorted(shards))))
    return sorted(found, key=lambda m: m.name)


def choose(repo: str, found: list[Model], kind: str = "") -> Model:
    """The model that `kind` means. GgufkitError, naming what is there, where it means none or several."""
    if not found:
        raise GgufkitError(f"hf:{repo}: holds no GGUF model (ggufkit convert hf:{repo} TYPE makes one of a checkpoint)")
    if kind.lower().endswith(".gguf"):
        for m in found:
            if kind in (m.name, PurePosixPath(m.name).name, *m.files):
                return m
        raise GgufkitError(f"hf:{repo}: holds no {kind}; there is {_names(found)}")
    for wanted in (kind,) if kind else DEFAULT_TYPES:
        fits = [m for m in found if _fits(m.name, wanted)]
        if len(fits) > 1:
            # "UD-Q4_K_M" is one publisher's own mix of that type: the plain one goes first
            fits = [m for m in fits if not _fits(m.name, f"UD-{wanted}")] or fits
        if len(fits) > 1:
            raise GgufkitError(f"hf:{repo}: {wanted} may mean {_names(fits)}; say which: hf:{repo}:{_base(fits[0])}")
        if fits:
            return fits[0]
    if len(found) == 1 and not (kind and _TYPE_IN_NAME.search(found[0].name)):
        return found[0]
    asked = kind or " or ".join(DEFAULT_TYPES)
    raise GgufkitError(f"hf:{repo}: holds no {asked}; there is {_names(found)}: say which, hf:{repo}:TYPE")


def _fits(name: str, kind: str) -> bool:
    """Whether a file's name contains the type as a word of its own; case, - and _ do not matter."""
    plain = kind.upper().replace("-", "_")
    plain = _ALIASES.get(plain, plain)
    pattern = re.escape(plain).replace("_", "[-_]")
    return re.search(rf"(?:^|[-._/]){pattern}(?:[-./]|$)", name, re.IGNORECASE) is not None


def _base(m: Model) -> str:
    return PurePosixPath(m.name).name


def _names(found: list[Model], most: int = 12) -> str:
    names = [_plain(m.name) for m in found]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _holding(listing: Listing) -> str:
    some = [_plain(n) for n in listing.files if not n.startswith(".")][:8]
    return (f"; there is {', '.join(some)}" if some else "; it is empty") + _where(listing)


def _where(listing: Listing) -> str:
    return " (in the cache; the server was not asked)" if listing.folder else ""


def _plain(name: str) -> str:
    """A name from a server, fit for a terminal."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def _safe(name: Any) -> bool:
    """Whether a name from a server stays inside the folder that it is put in."""
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]


def _list(repo: str) -> Listing:
    """What the repository holds: by the server, or by the cache where the server cannot be asked."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        cached = _cached(repo)
        if cached is None:
            raise GgufkitError(f"hf:{repo}: not in the Hugging Face cache, and HF_HUB_OFFLINE forbids to fetch it")
        return cached
    try:
        with _quiet():
            info = huggingface_hub.HfApi().model_info(repo, timeout=30)
    except Exception as error:
        cached = _cached(repo) if _unreachable(error) else None
        if cached is None:
            raise _one_line(error, repo) from error
        print(f"{_endpoint()} cannot be reached: using what the cache holds of {repo}", file=sys.stderr)
        return cached
    return Listing(repo, tuple(s.rfilename for s in info.siblings or [] if _safe(s.rfilename)))


def _cached(repo: str) -> Listing | None:
    """The snapshot of the repository's main branch in huggingface_hub's cache, if there is one."""
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"
    try:
        commit = (root / "refs" / "main").read_text(encoding="ascii").strip()
        if not re.fullmatch(r"[0-9a-f]{4,64}", commit):
            return None
        folder = root / "snapshots" / commit
        files = tuple(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
    except (OSError, ValueError):
        return None
    return Listing(repo, files, folder) if files else None


def _fetch(listing: Listing, name: str) -> Path:
    """One file's local path, fetched if the cache lacks it."""
    if listing.folder is not None:
        return listing.folder / name
    import huggingface_hub

    options: dict[str, Any] = {}
    if not sys.stderr.isatty() and "tqdm_class" in inspect.signature(huggingface_hub.hf_hub_download).parameters:
        options["tqdm_class"] = _line_bar()
    try:
        with _quiet():
            return Path(huggingface_hub.hf_hub_download(listing.repo, name, **options))
    except Exception as error:
        raise _one_line(error, listing.repo, name) from error


def _line_bar() -> Callable[..., Any]:
    """huggingface_hub's progress bar, as a plain line every five seconds: for where stderr is no terminal."""
    from huggingface_hub.utils import tqdm

    class Lines(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            kwargs |= {"mininterval": 5, "maxinterval": 10, "delay": 5, "ncols": 0, "leave": False}
            super().__init__(*args, **kwargs)

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            # tqdm asks for an empty line to wipe its bar at the end
            if msg != "" and self.n < (self.total or 0):
                sys.stderr.write((str(self) if msg is None else msg) + "\n")

    return Lines


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of huggingface_hub on stderr: what matters comes as an error."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it came from."""
    seen = 0
    while error is not None and seen < 10:
        yield error
        error, seen = error.__cause__ or error.__context__, seen + 1


def _status(error: BaseException) -> int | None:
    for e in _chain(error):
        status = getattr(getattr(e, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _unreachable(error: BaseException) -> bool:
    """Whether no answer came, or only a server's own failure; the HTTP library differs between versions."""
    status = _status(error)
    if status is not None:
        return status >= 500
    libraries = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
    return any(
        isinstance(e, (ConnectionError, TimeoutError)) or type(e).__module__.partition(".")[0] in libraries
        for e in _chain(error)
    )


def _one_line(error: Exception, repo: str, name: str | None = None) -> GgufkitError:
    """What went wrong, in one line."""
    from huggingface_hub import errors

    what = f"hf:{repo}" + (f": {_plain(name)}" if name else "")
    kinds = tuple(type(e) for e in _chain(error))

    def is_a(*classes: type[BaseException]) -> bool:
        return any(issubclass(kind, classes) for kind in kinds)

    status = _status(error)
    if is_a(errors.GatedRepoError):
        return GgufkitError(f"{what}: gated; accept its terms on {_endpoint()}/{repo} and set HF_TOKEN")
    if status == 401 or is_a(errors.RepositoryNotFoundError):
        return GgufkitError(f"{what}: no such repository on {_endpoint()}, or a private one that needs HF_TOKEN")
    if status == 403:
        return GgufkitError(f"{what}: {_endpoint()} refuses access; does HF_TOKEN give it?")
    if is_a(errors.HFValidationError):
        return GgufkitError(f"{what}: not a repository's name")
    if is_a(errors.OfflineModeIsEnabled):
        return GgufkitError(f"{what}: not in the Hugging Face cache, and HF_HUB_OFFLINE forbids to fetch it")
    if status == 404 or is_a(errors.RevisionNotFoundError):
        return GgufkitError(f"{what}: not found on {_endpoint()}")
    if status is not None:
        return GgufkitError(f"{what}: {_endpoint()} answered with HTTP status {status}")
    if _unreachable(error):
        return GgufkitError(f"{what}: {_endpoint()} cannot be reached, and the cache does not hold it")
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return GgufkitError(f"{what}: {_plain(first)[:200]}")
