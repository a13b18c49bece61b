"""One small model of each family for all tests."""

import functools

import pytest

from pipeline.vlm.backbone import load_backbone
from pipeline.vlm.base import base_of
from pipeline.vlm.preparer import Preparer
from pipeline.vlm.settings import Sizes
from tests.vlm.models import save_model


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """The folder of a family's small model, made at its first use."""
    root = tmp_path_factory.mktemp("vlm")

    @functools.cache
    def made(family):
        if family == "smolvlm":
            pytest.importorskip("num2words", reason="SmolVLM's processor asks for it")
        return save_model(root / family, family)

    return made


@pytest.fixture(scope="session")
def backbone_of(folder_of):
    """The backbone of a family's small model, float32 on the CPU."""

    @functools.cache
    def loaded(family):
        base = base_of(str(folder_of(family)))
        return load_backbone(base, Preparer(base, Sizes()), dtype="float32", device="cpu")

    return loaded
