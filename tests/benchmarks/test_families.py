"""The benchmark of whole models: its peer computes the same, its command writes what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import driftar
import driftar_kernels
from benchmarks import families

TINY = ["mar_tiny", "transdiff_tiny", "transdiff_mrar_tiny", "drift_ar_tiny", "nextstep_1_tiny"]


@pytest.mark.parametrize("name", TINY)
def test_peer_generates_the_same_image(name: str) -> None:
    model = driftar.build_model(name).eval()
    for parameter in model.parameters():
        if not parameter.any():  # what starts as nothing would hide everything before it
            torch.nn.init.normal_(parameter, std=0.02)
    options = {key: type(value)(3) for key, value in families._settings_of(name).items()}
    images = []
    for variant in (families.OURS, families.PEER):
        generator = torch.Generator().manual_seed(0)
        with families.attention_of(variant):
            request = families._request(model)
            images.append(model.generate(request, generator=generator, **options))
    assert images[0].abs().amax() > 0
    torch.testing.assert_close(images[1], images[0], rtol=1e-4, atol=1e-4)


def test_peer_entropy_is_that_of_the_operator() -> None:
    query, key, value = torch.randn(3, 2, 4, 12, 8).unbind()
    mask = torch.rand(12, 12) < 0.6
    options = {"entropy": "map", "entropy_from": 3, "is_causal": True, "query_offset": 2}
    key, value = key[:, :2], value[:, :2]
    ours = driftar_kernels.attention(query, key, value, mask, enable_gqa=True, **options)
    peer = families.sdpa_attention(query, key, value, mask, enable_gqa=True, **options)
    assert ours.entropy is not None and peer.entropy is not None
    torch.testing.assert_close(peer.entropy, ours.entropy, rtol=0, atol=1e-5)


def test_attention_is_restored_after_an_error() -> None:
    ours = driftar_kernels.attention
    with pytest.raises(RuntimeError), families.attention_of(families.PEER):
        assert driftar_kernels.attention is families.sdpa_attention
        raise RuntimeError
    assert driftar_kernels.attention is ours


def test_command_writes_page_record_and_picture(tmp_path: Path) -> None:
    arguments = ["--models", *TINY, "--rounds", "1", "--steps", "2", "--output", str(tmp_path)]
    assert families.main(arguments) == 0
    page = (tmp_path / "families.md").read_text(encoding="utf-8")
    record = json.loads((tmp_path / "families.json").read_text(encoding="utf-8"))
    assert [entry["model"] for entry in record["measurements"]] == TINY
    for entry in record["measurements"]:
        assert entry["model"] in page
        for variant in (families.OURS, families.PEER):
            assert entry["seconds"][variant]["AR"] > 0
    assert (tmp_path / "families.png").stat().st_size > 10_000


def test_command_refuses_what_cannot_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        families.main(["--models", "kl16"])
    assert "mar_base" in capsys.readouterr().err
