"""The card beside a model: a head that the hub reads, what was done, figures with intervals, how to load it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import pytest
import yaml

from helpers.made_reports import made_summary
from remend.models.find import ModelSource
from remend.models.origin import head_of, origin_of
from remend.report.card import Card, Part, escape, named, part_of_damage, parts_of_run, relation_of, ways_to_use

MANIFEST = {
    "recipe": {"student": "/home/me/int3", "teacher": "org/base", "steps": 40, "seed": 0},
    "reference": "org/base",
}


def head(text: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return content


def test_a_card_has_what_the_hub_reads_and_the_figures_with_their_interval() -> None:
    origin = {"license": "apache-2.0", "base_model": "org/base"}
    parts = parts_of_run(made_summary(), MANIFEST)
    text = Card("mine", "A lead.", parts, origin, "quantized", use=ways_to_use()).markdown()
    assert head(text) == {
        "license": "apache-2.0",
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["remend"],
    }
    for said in ("95% interval 61% to 67%", "| 2.500 | 0.900 |", "AutoModelForCausalLM", "vllm serve", "steps: 24"):
        assert said in text
    assert "/home/me" not in text, "a card is published"
    assert "student: int3" in text


def test_what_is_not_known_is_left_out_and_said() -> None:
    text = Card("mine", "A lead.", [], relation="quantized").markdown()
    assert set(head(text)) == {"library_name", "pipeline_tag", "tags"}
    assert "licence: not known" in text
    assert "base model: not known" in text


def test_adapters_and_gguf_files_are_loaded_otherwise() -> None:
    adapter = "\n".join(code for _, _, code in ways_to_use(adapter_of="org/base"))
    assert "AutoPeftModelForCausalLM" in adapter
    assert "vllm serve org/base --enable-lora" in adapter
    assert ways_to_use(gguf="model.gguf")[0][2] == "llama-server -m THIS_DIRECTORY/model.gguf"
    assert relation_of({"kind": "quantization"}) == "quantized"
    assert [relation_of({}), relation_of({}, trained=True)] == ["", "finetune"]


def test_a_summary_of_another_version_is_said() -> None:
    (_, measured) = parts_of_run({"recovered": {"kl": 1.0}, "steps": 1}, MANIFEST)
    assert "another version" in measured.text


def test_the_probe_of_a_degradation_is_told() -> None:
    record = {
        "kind": "noise",
        "reference": {"model": "/a/b"},
        "probe": {"kl": 0.5, "top1_agreement": 0.7, "prompts": 32},
    }
    bullets = part_of_damage(record, "What was done").bullets
    assert bullets[0] == "made from: b"
    assert "KL 0.500" in bullets[-1]


def test_text_can_not_become_markup() -> None:
    assert escape("a\n# b [x](y) <script>`") == "a \\# b \\[x\\](y) &lt;script&gt;\\`"
    bad = "x\n---\nlicense: mit\n<script>"
    text = Card(bad, bad, [Part(bad, bad, [bad])], {"license": "x: [y"}, library="peft").markdown()
    assert "<script>" not in text
    assert head(text)["license"] == "x: [y"
    assert [named(spec) for spec in ("org/name@v1", "smollm2", "/a/b c", "./x/y")] == [
        "org/name@v1",
        "smollm2",
        "b c",
        "y",
    ]


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\nbase_model: org/base\n---\ntext", {"license": "mit", "base_model": "org/base"}),
        (
            "---\nlicense: other\nlicense_name: mine\nbase_model: [a/b, c/d]\n---\n",
            {"license": "other", "license_name": "mine", "base_model": "a/b"},
        ),
        ("---\nlicense: [mit]\nbase_model: /a/path\n---\n", {}),
        ("---\n{ broken\n---\n", {}),
        ("no head", {}),
    ],
)
def test_the_origin_is_read_from_a_card(card: str, expected: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    source = ModelSource("m", "directory", tmp_path)
    assert origin_of(source) == expected


def test_the_nearest_that_knows_it_names_each_field(tmp_path: Path) -> None:
    for name, card in {"student": "---\nbase_model: org/student\n---\n", "teacher": "---\nlicense: mit\n---\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(card)
    student, teacher = (ModelSource(n, "directory", tmp_path / n) for n in ("student", "teacher"))
    assert origin_of(student, teacher) == {"base_model": "org/student", "license": "mit"}
    hub = ModelSource("org/base", "directory", tmp_path / "teacher", repo="org/base")
    assert origin_of(hub) == {"base_model": "org/base", "license": "mit"}
    assert origin_of(ModelSource("a", "adapter", tmp_path, base=hub)) == {"base_model": "org/base", "license": "mit"}
    assert origin_of(ModelSource("org/base", "hub", None, repo="org/base")) == {"base_model": "org/base"}


def test_the_origin_is_read_from_a_gguf_header(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.add_key_value("general.base_model.0.repo_url", "https://huggingface.co/org/base", gguf.GGUFValueType.STRING)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert origin_of(ModelSource("m", "gguf", tmp_path / "m.gguf")) == {
        "license": "apache-2.0",
        "base_model": "org/base",
    }


@pytest.mark.parametrize("head", ["license: !!bool x", "license: mit\n? ", 'license: "\\ud800"', "a: &a [*a]"])
def test_a_card_whose_head_cannot_be_read_counts_as_none(tmp_path: Path, head: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# A model\n")
    assert not head_of(tmp_path / "README.md").get("base_model")


def test_a_card_that_is_a_pipe_counts_as_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "README.md")
    assert head_of(tmp_path / "README.md") == {}
