"""What each file type costs a model: perplexity, divergence from a reference, bytes, measured one type after the other.

The reference is the model as F32, rescaled on request (quantize/rescale.py); its logits are recorded once. Results are
kept after each type, so that a run which was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ggufkit_formats import blocks, gguf
from ggufkit_formats.errors import FormatError, GgufkitError, UnsupportedError, UsageError

from .quantize import file_types, rescale
from .quantize.ternary import TYPES as TERNARY

LEFT_OUT = ("F32", "MXFP4_MOE")  # the reference; Q8_0 under another name, for a model without experts
AUTO = "auto"  # in place of a matrix: made from the first half of the text, and the second half is scored

Progress = Callable[[str, float, float], Any]  # what, done, in all


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to make a file: a file type, with importance or without, and how weights become ternary."""

    type: str
    importance: bool = False
    ternary: str = "ggml"

    @property
    def label(self) -> str:
        more = " search" if self.ternary == "search" else " + importance" if self.importance else ""
        return self.type + more


def variants(types: Sequence[str] = (), importance: bool = False) -> list[Variant]:
    """All variants of the file types (default: all but LEFT_OUT), in the order of their list.

    With `importance`, types that can use a matrix come twice: without and with.
    """
    asked = [file_types.find(name) for name in types]
    found: list[Variant] = []
    for each in asked or [t for t in file_types.FILE_TYPES.values() if t.name not in LEFT_OUT]:
        found.append(Variant(each.name))
        if importance and each.type in blocks.TYPES and blocks.TYPES[each.type].uses_importance:
            found.append(Variant(each.name, True))
        if each.name in TERNARY:
            found.append(Variant(each.name, False, "search"))
    return list(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured, on what. Results of other settings are not comparable."""

    text: Path
    n_ctx: int = 512
    n_chunks: int | None = None
    seed: int | None = None  # of the rescaling; None: the model as it is
    imatrix: str | None = None  # a file, or AUTO
    threads: int | None = None

    @property
    def texts(self) -> tuple[str, str]:
        """The part that makes the importance matrix (empty where none is made), and the part that is scored."""
        try:
            whole = self.text.read_text(encoding="utf-8")
        except OSError as error:
            raise GgufkitError(f"{self.text}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.text}: not UTF-8 text (byte {error.start})") from None
        if self.imatrix != AUTO:
            return "", whole
        middle = whole.find("\n", len(whole) // 2) + 1 or len(whole) // 2
        return whole[:middle], whole[middle:]


class Study:
    """The results for one model, in a JSON file: `run` measures what is missing, `results` is what there is.

    `work` is a folder for models on their way: as much as the model takes as F32, twice, and the logits.
    """

    def __init__(self, model: str | os.PathLike[str], results: Path, settings: Settings, work: Path):
        self.model, self.path, self.settings, self.work = Path(model), results, settings, work
        about = self._about()
        self.document: dict[str, Any] = about | {"results": []}
        if results.exists():
            try:
                found = json.loads(results.read_text(encoding="utf-8"))
                same = {key: found.get(key) for key in about} == about
            except (OSError, ValueError, AttributeError) as error:
                raise GgufkitError(f"{results}: cannot be gone on with: {error}") from None
            if not same:
                what = ", ".join(key for key in about if found.get(key) != about[key])
                raise UsageError(f"{results}: holds results of other settings ({what}); name another file")
            self.document = found

    @property
    def results(self) -> list[dict[str, Any]]:
        return self.document["results"]

    def _about(self) -> dict[str, Any]:
        s = self.settings
        text = s.texts[1].encode()
        matrix = s.imatrix if s.imatrix in (None, AUTO) else digest(Path(s.imatrix))
        return {
            "model": {"name": self.model.name, "sha256": digest(self.model)},
            "text": {"name": s.text.name, "sha256": hashlib.sha256(text).hexdigest(), "bytes": len(text)},
            "ctx_size": s.n_ctx,
            "chunks": s.n_chunks,
            "rescale_seed": s.seed,
            "imatrix": matrix,
        }  # fmt: skip

    def missing(self, wanted: Sequence[Variant]) -> list[Variant]:
        """Those of the variants that have no result yet."""
        known = {(each["type"], each["importance"], each["ternary"]) for each in self.results}
        return [v for v in wanted if (v.type, v.importance, v.ternary) not in known]

    def run(self, wanted: Sequence[Variant], progress: Progress = lambda *_: None) -> Iterator[dict[str, Any]]:
        """Measure the variants that are missing; each result is kept before it is yielded.

        `progress` is told (what is done, done, in all).
        """
        missing = self.missing(wanted)
        if not missing:
            return
        source = self._reference(progress)
        recorded = self._recorded(source, progress)
        matrix = self._matrix(source, progress) if any(v.importance for v in missing) else None
        for variant in missing:
            result = self._measure(variant, source, recorded, matrix, progress)
            self.results.append(result)
            self._keep()
            yield result

    # -- the reference -----------------------------------------------------------------------------

    def _reference(self, progress: Progress) -> Path:
        """The model as an F32 GGUF file, rescaled where that is asked for."""
        from .convert import convert

        self.work.mkdir(parents=True, exist_ok=True)
        plain, target = self.work / "plain.gguf", self.work / "reference.gguf"
        rescaled = self.settings.seed is not None
        source = self.model
        if not (rescaled and self.model.is_file() and self.model.suffix == ".gguf"):
            told = lambda done, total: progress("reference", done, total)  # noqa: E731
            convert(self.model, "f32", plain if rescaled else target, overwrite=True, allow_requantize=True,
                    threads=self.settings.threads, progress=told)  # fmt: skip
            source = plain
        if self.settings.seed is not None:
            rescale.write(source, target, self.settings.seed, True, lambda *n: progress("rescaling", *n))
            plain.unlink(missing_ok=True)
        return target

    def _recorded(self, source: Path, progress: Progress) -> Any:
        """The reference's logits over the text; its perplexity is noted."""
        from ggufkit_runtime import evaluate, generate
        from ggufkit_runtime.recorded import Recorded

        s = self.settings
        model = generate.load(source, threads=s.threads)
        recorded = Recorded(model, self.work / "logits.f32")
        text = s.texts[1]
        recorded.record(text, s.n_ctx, s.n_chunks, lambda *n: progress("reference", *n))
        found = evaluate.perplexity(recorded, text, s.n_ctx, s.n_chunks)
        n_bytes, n_parameters = model.info.n_bytes, model.info.n_parameters
        self.document["reference"] = asdict(found) | {"n_bytes": n_bytes, "n_parameters": n_parameters}
        return recorded

    def _matrix(self, source: Path, progress: Progress) -> Path:
        from ggufkit_runtime import generate, importance

        from .quantize import imatrix

        s = self.settings
        if s.imatrix is None:
            raise UsageError("types that use importance are asked for, and there is no importance matrix")
        if s.imatrix != AUTO:
            return Path(s.imatrix)
        model = generate.load(source, threads=s.threads)
        found = importance.collect(model, s.texts[0], s.n_ctx, None, lambda *n: progress("importance", *n))
        target = self.work / "importance.gguf"
        matrix = imatrix.of_activations(found.sums, found.counts, found.n_chunks, found.n_ctx, s.text.name)
        imatrix.write(matrix, target, overwrite=True)
        return target

    # -- one variant -------------------------------------------------------------------------------

    def _measure(self, variant: Variant, source: Path, recorded: Any, matrix: Path | None,
                 progress: Progress) -> dict[str, Any]:  # fmt: skip
        """The result; a type that the model cannot have gets the reason, `error`."""
        from ggufkit_runtime import evaluate, generate

        from .convert import convert

        s, target = self.settings, self.work / "model.gguf"
        # what a file type leaves as it is would be F32 here, and is F16 when a checkpoint is converted
        ends = "F16" if file_types.find(variant.type).output == file_types.KEPT else None
        try:
            report = convert(
                source, variant.type, target, overwrite=True, imatrix=matrix if variant.importance else None,
                output_tensor_type=ends, token_embedding_type=ends,
                ternary=variant.ternary, measure=True, threads=s.threads,
                progress=lambda *n: progress(f"{variant.label}: writing", *n),
            )  # fmt: skip
        except UnsupportedError as error:
            return asdict(variant) | {"error": str(error)}
        assert report.total is not None
        model = generate.load(target, threads=s.threads)
        found, divergence = evaluate.against(
            model,
            recorded,
            s.texts[1],
            s.n_ctx,
            s.n_chunks,
            lambda done, total, _: progress(variant.label, done, total),
        )
        with gguf.open(target) as file:
            sizes = {name: t.n_elements for name, t in file.tensors.items() if len(t.shape) > 1}
        fallen = {entry.name: entry for entry in report.fallbacks}
        instead = sorted({entry.type for entry in fallen.values()})
        share = sum(sizes[name] for name in fallen) / sum(sizes.values())
        target.unlink()
        return asdict(variant) | {
            "n_bytes": model.info.n_bytes,
            "bits_per_weight": report.bits_per_weight,
            **asdict(found),
            **asdict(divergence),
            "rel_rmse": report.total.relative_rmse,
            "max_error": report.total.max_difference,
            "fallback": share,  # share of the matrices' weights
            "instead": instead,
        }

    def _keep(self) -> None:
        """Results stand in the order of the file types, however they came."""
        order = [variant.label for variant in variants(importance=True)]
        at = {label: i for i, label in enumerate(order)}
        self.results.sort(key=lambda each: at.get(of(each).label, len(order)))
        new = self.path.with_name(f".{self.path.name}.part")
        new.write_text(dumps(self.document), encoding="utf-8")
        new.replace(self.path)


def of(result: Mapping[str, Any]) -> Variant:
    """The variant that a result is of."""
    return Variant(result["type"], result["importance"], result["ternary"])


def dumps(document: Mapping[str, Any]) -> str:
    """JSON with a line for each result, and for all else."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in document.items() if key != "results"]
    results = ",\n".join(f"    {json.dumps(each)}" for each in document["results"])
    return "{\n" + ",\n".join([*lines, f'  "results": [\n{results}\n  ]']) + "\n}\n"


def digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of its weights and settings."""
    found = hashlib.sha256()
    files = [path]
    if path.is_dir():
        files = sorted([*path.glob("*.safetensors"), *path.glob("config.json")])
    try:
        for each in files:
            with each.open("rb") as file:
                while piece := file.read(1 << 20):
                    found.update(piece)
    except OSError as error:
        raise GgufkitError(f"{path}: {error.strerror or error}") from None
    return found.hexdigest()
