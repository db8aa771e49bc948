"""ggufkit/quality.py and tools/quality.py: every file type measured, results that are kept, the table and the plot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from ggufkit_formats.errors import GgufkitError, UnsupportedError, UsageError
from ggufkit_runtime import evaluate, generate

from ggufkit import quality
from ggufkit.convert import convert
from ggufkit.quality import Settings, Study, Variant, variants
from ggufkit.quantize import file_types, rescale

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import quality_page  # noqa: E402

PAGE = ROOT / "docs" / "quality.md"
RESULTS = sorted((ROOT / "docs" / "quality").glob("*.json"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_models.write(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("To be, or not to be: that is the question.\n" * 14)
    return path


def settings(text, **more) -> Settings:
    return Settings(text, n_ctx=64, n_chunks=2, threads=1, **more)


# -- what is measured ------------------------------------------------------------------------------


def test_all_types_that_can_be_written():
    plain = [v.type for v in variants() if v.ternary == "ggml"]
    assert plain == [name for name in file_types.FILE_TYPES if name not in quality.LEFT_OUT]
    assert {"NF4", "NF4_DQ", "MXFP4", "NVFP4", "TQ1_0", "IQ1_S", "Q1_0"} <= set(plain)
    assert [v.label for v in variants() if v.ternary == "search"] == ["TQ1_0 search", "TQ2_0 search", "Q2_0 search"]
    both = variants(importance=True)
    weighted = {v.type for v in both if v.importance}
    assert {"Q4_0", "Q2_K", "IQ4_NL", "IQ1_S"} <= weighted
    assert not weighted & {"F16", "Q8_0", "NF4", "NF4_DQ", "MXFP4", "TQ2_0"}
    assert [v.label for v in variants(["q4_k", "tq2_0"], True)] == [
        "Q4_K_M", "Q4_K_M + importance", "TQ2_0", "TQ2_0 search",
    ]  # fmt: skip
    with pytest.raises(UnsupportedError, match="did you mean"):
        variants(["q4_k_x"])


def test_results_are_those_of_the_commands(tiny, text, tmp_path):
    """Reference, conversion and evaluation done by hand."""
    study = Study(tiny, tmp_path / "r.json", settings(text, seed=3), tmp_path / "work")
    (result,) = study.run(variants(["q4_k_s"]))
    rescale.write(tiny, tmp_path / "ref.gguf", 3)
    report = convert(tmp_path / "ref.gguf", "q4_k_s", tmp_path / "a.gguf", measure=True)
    model, reference = (generate.load(tmp_path / f"{name}.gguf", threads=1) for name in ("a", "ref"))
    perplexity, divergence = evaluate.against(model, reference, text.read_text(), 64, 2)
    assert report.total is not None
    expected = {
        "perplexity": perplexity.perplexity, "n_tokens": perplexity.n_tokens, "kl_mean": divergence.kl_mean,
        "kl_stderr": divergence.kl_stderr, "same_top": divergence.same_top, "n_bytes": model.info.n_bytes,
        "bits_per_weight": report.bits_per_weight, "rel_rmse": report.total.relative_rmse,
    }  # fmt: skip
    assert {key: result[key] for key in expected} == expected
    assert result["instead"] == [] and result["fallback"] == 0 < result["kl_mean"]
    measured = study.document["reference"]
    assert measured["perplexity"] == evaluate.perplexity(reference, text.read_text(), 64, 2).perplexity
    assert measured["n_bytes"] == reference.info.n_bytes
    assert not (tmp_path / "work" / "model.gguf").exists()


def test_a_run_that_was_stopped_goes_on(tiny, text, tmp_path, monkeypatch):
    path, wanted = tmp_path / "r.json", variants(["q8_0", "q4_0", "tq2_0"])
    whole = Study(tiny, tmp_path / "whole.json", settings(text), tmp_path / "work")
    assert len(list(whole.run(wanted))) == 4
    first = Study(tiny, path, settings(text), tmp_path / "work")
    run = first.run(wanted)
    kept = [next(run), next(run)]
    run.close()
    second = Study(tiny, path, settings(text), tmp_path / "work")
    assert [r["type"] for r in kept] == ["Q8_0", "Q4_0"]
    assert second.results == kept[::-1] == json.loads(path.read_text())["results"]  # in the order of the types
    assert [v.label for v in second.missing(wanted)] == ["TQ2_0", "TQ2_0 search"]
    assert [r["type"] for r in second.run(wanted)] == ["TQ2_0", "TQ2_0"]
    assert second.results == whole.results and path.read_text() == (tmp_path / "whole.json").read_text()
    monkeypatch.setattr(Study, "_reference", lambda *_: pytest.fail("nothing is left to measure"))
    assert list(Study(tiny, path, settings(text), tmp_path / "work").run(wanted)) == []


def test_results_stand_in_the_order_of_the_types(tiny, text, tmp_path):
    study = Study(tiny, tmp_path / "r.json", settings(text), tmp_path / "work")
    list(study.run([*variants(["q8_0"]), *variants(["f16"])]))
    assert [r["type"] for r in study.results] == ["F16", "Q8_0"]


def test_other_settings_are_another_study(tiny, text, tmp_path):
    path = tmp_path / "r.json"
    list(Study(tiny, path, settings(text), tmp_path / "work").run(variants(["f16"])))
    other = tiny_models.write(tmp_path / "other.gguf", seed=1)
    for model, given, what in (
        (tiny, settings(text, seed=1), "rescale_seed"),
        (tiny, Settings(text, 32), "ctx_size, chunks"),
        (tiny, settings(text, imatrix="auto"), "text, imatrix"),
        (other, settings(text), "model"),
    ):
        with pytest.raises(UsageError, match=rf"r.json: holds results of other settings \({what}\)"):
            Study(model, path, given, tmp_path / "work")
    path.write_text("[]")
    with pytest.raises(GgufkitError, match=r"r.json: cannot be gone on with"):
        Study(tiny, path, settings(text), tmp_path / "work")
    with pytest.raises(GgufkitError, match=r"none.txt: No such file"):
        Study(tiny, path, settings(tmp_path / "none.txt"), tmp_path / "work")
    with pytest.raises(GgufkitError, match=r"none.gguf: No such file"):
        Study(tmp_path / "none.gguf", path, settings(text), tmp_path / "work")


def test_importance_and_what_cannot_be_made(tiny, text, tmp_path):
    """A matrix from the first half of the text; what needs one is refused without, with the reason."""
    study = Study(tiny, tmp_path / "r.json", settings(text, imatrix="auto"), tmp_path / "work")
    parts = study.settings.texts
    assert "".join(parts) == text.read_text() and parts[0].endswith("\n") and abs(len(parts[0]) - len(parts[1])) < 100
    found = {quality.of(r).label: r for r in study.run(variants(["q2_k", "iq2_xs"], True))}
    assert "importance matrix" in found["IQ2_XS"]["error"] and "kl_mean" not in found["IQ2_XS"]
    assert found["IQ2_XS + importance"]["kl_mean"] > 0
    assert found["Q2_K"]["n_bytes"] == found["Q2_K + importance"]["n_bytes"]
    assert found["Q2_K"]["kl_mean"] != found["Q2_K + importance"]["kl_mean"]
    (row,) = [line for line in quality_page.table(study.document).splitlines() if line.startswith("| IQ2_XS ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[4] == "-" and cells[5] == quality_page.divergence(found["IQ2_XS + importance"])
    with pytest.raises(UsageError, match="no importance matrix"):
        list(Study(tiny, tmp_path / "n.json", settings(text), tmp_path / "work").run([Variant("Q2_K", True)]))


def test_rows_that_do_not_fit(text, tmp_path):
    narrow = tiny_models.write(tmp_path / "a.gguf", optional=False, hidden_size=192, num_attention_heads=3,
                               num_key_value_heads=1)  # fmt: skip
    study = Study(narrow, tmp_path / "r.json", settings(text), tmp_path / "work")
    q4_k, q1_0 = study.run(variants(["q4_k_m", "q1_0"]))
    assert q4_k["instead"] == ["Q5_0", "Q8_0"] and 0.5 < q4_k["fallback"] < 1  # ffn_down's rows are 512 long
    assert "not divisible by 128" in q1_0["error"]
    text_of = quality_page.table(study.document)
    assert f"{100 * q4_k['fallback']:.0f} % to Q5_0, Q8_0 |" in text_of and "not made: tensor" in text_of


# -- table, plot, command --------------------------------------------------------------------------


def test_a_table_goes_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- quality: x -->\nold\n<!-- end -->\nb\n<!-- quality: y -->\n<!-- end -->\n")
    quality_page.insert(page, "x", "| t |")
    assert page.read_text().startswith(
        "a\n<!-- quality: x -->\n\n| t |\n\n<!-- end -->\nb\n<!-- quality: y -->\n<!-- end"
    )
    with pytest.raises(UsageError, match=r"page.md: has no place"):
        quality_page.insert(page, "z", "| t |")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_document_is_current(path):
    """docs/quality.md holds the tables of the results beside it, and shows their plots."""
    document = json.loads(path.read_text())
    page = PAGE.read_text()
    assert quality_page.inserted(page, path.stem, quality_page.table(document)) == page
    assert f"](quality/{path.stem}.svg)" in page and path.with_suffix(".svg").exists()
    assert quality.dumps(document) == path.read_text()
    assert set(map(quality.of, document["results"])) <= set(variants(importance=True))


def test_there_are_both_documents():
    assert [path.stem for path in RESULTS] == ["default-model", "small-model"]
    small, default = (json.loads(path.read_text()) for path in reversed(RESULTS))
    assert default["rescale_seed"] is not None and small["rescale_seed"] is None
    assert small["model"]["sha256"] == quality.digest(ROOT / "tests" / "data" / "small-model")
    for each in (small, default):
        assert set(map(quality.of, each["results"])) == set(variants(importance=True))
    assert not [r for r in small["results"] if r.get("instead")]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_plot(path, tmp_path):
    """Every label stands there, none on another, and equal results give equal files."""
    pytest.importorskip("matplotlib")
    document = json.loads(path.read_text())
    for name in ("a.svg", "b.svg"):
        boxes = quality_page.plot(document, tmp_path / name, "A model")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    shown = (tmp_path / "a.svg").read_text()
    for label, plain, weighted, _ in quality_page.rows(document):
        drawn = label not in ("F16", "BF16") and (plain is not None or weighted is not None)
        assert (f"<!-- {label} -->" in shown) == drawn, label
    assert "bits per weight" in shown and "A model" in shown
    assert ("random rescaling" in shown) == (document["rescale_seed"] is not None)
    for i, box in enumerate(boxes):
        assert not any(quality_page.overlap(box, other) > 20 for other in boxes[:i])


def test_plot_as_pixels(tmp_path):
    pytest.importorskip("matplotlib")
    document = json.loads(RESULTS[-1].read_text())
    quality_page.plot(document | {"results": document["results"][:4]}, tmp_path / "a.png", "A model")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(tiny, text, tmp_path):
    target = tmp_path / "r.json"
    page = tmp_path / "page.md"
    page.write_text("<!-- quality: r -->\n<!-- end -->\n")
    options = ["--types", "q8_0,q4_0", "-c", "64", "--chunks", "2", "-t", "1", "--rescale", "5", "--page", page]
    command = [sys.executable, ROOT / "tools" / "quality.py", tiny, "-f", text, "-o", target, *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    document = json.loads(target.read_text())
    assert [r["type"] for r in document["results"]] == ["Q4_0", "Q8_0"] and document["rescale_seed"] == 5
    assert done.stdout.strip() == quality_page.table(document) and done.stdout.strip() in page.read_text()
    assert "Q8_0: " in done.stderr and "(1 left)" in done.stderr and "(0 left)" in done.stderr
    done = subprocess.run([*map(str, [*command, "--rescale", "6"])], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ") and not done.stdout
    assert "Traceback" not in done.stderr
