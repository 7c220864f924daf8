"""Which kind a module is of, and in which layer it stands, over the naming of many architectures."""

from __future__ import annotations

from inilora_kernels.display.names import labels_of, places_of


def kinds(names: list[str]) -> list[str]:
    return list(dict.fromkeys(place.kind for place in places_of(names)))


def test_endings_that_several_kinds_share_are_told_apart() -> None:
    parts = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    names = [f"encoder.layer.{layer}.{part}" for layer in range(3) for part in parts]
    assert kinds(names) == ["query", "attention.output.dense", "intermediate.dense", "output.dense"]


def test_encoder_and_decoder_are_kinds_of_their_own() -> None:
    names = [f"{side}.block.{layer}.layer.0.SelfAttention.q" for side in ("encoder", "decoder") for layer in range(3)]
    assert kinds(names) == ["encoder…q", "decoder…q"]


def test_a_layer_is_the_first_number_that_varies() -> None:
    names = [f"0.auto_model.layer.{layer}.experts.{expert}.w1" for layer in (3, 4) for expert in range(2)]
    assert [(place.kind, place.layer) for place in places_of(names)] == [("w1", 3), ("w1", 3), ("w1", 4), ("w1", 4)]


def test_parts_of_fused_weights_and_bare_names() -> None:
    assert kinds(["h.0.c_attn:query", "h.0.c_attn:value", "h.1.c_attn:query", "h.1.c_attn:value"]) == ["query", "value"]
    assert kinds(["0", "1", "2"]) == ["matrix"]


def test_two_names_with_different_control_characters_stay_two() -> None:
    labels, pattern = labels_of(["a.\x1b[1m.q", "a.\u202e.q"])
    assert labels == [r"\x1b[1m", r"\u202e"]
    assert pattern == "a.*.q"
