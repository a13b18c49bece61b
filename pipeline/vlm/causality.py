"""Bidirectional attention for a language model that was trained causally, and the proof that it took.

transformers from 5.2 reads `is_causal` in the decoder's configuration, where the decoder asks it for its masks; it is saved with
the model, so that whoever loads the folder gets the same. A decoder that makes its own masks is given a finished one of four
dimensions. What took is measured, layer by layer: a class that honours neither is refused by name.

The vectors of a model that was not trained so are of no use before training (arXiv 2409.02727, section 4).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pipeline.config import ConfigError


def make_bidirectional(model: nn.Module) -> nn.Module:
    """The same model, every token of it seeing every other one that is not padding. Raises ConfigError if that cannot be done.

    Sliding windows stay windows, to both sides. A vision tower, which sees both ways anyway, is left as it is.
    """
    decoder = decoder_of(model)
    for config in _configs(model, decoder):
        config.is_causal = False
    if _blind_layers(decoder):
        handle = decoder.register_forward_pre_hook(_finished_mask, with_kwargs=True)
        try:
            check_bidirectional(model)
        except Exception as error:  # what a class makes of a mask that it does not expect
            handle.remove()
            raise ConfigError(_refusal(decoder, _blind_layers(decoder))) from error
    check_bidirectional(model)
    return model


def saved_with_model(model: nn.Module) -> bool:
    """Whether the configuration alone makes the model bidirectional, so that whoever loads it gets the same."""
    decoder = decoder_of(model)
    hooked = _finished_mask in decoder._forward_pre_hooks.values()
    return not hooked and all(getattr(config, "is_causal", True) is False for config in _configs(model, decoder))


def check_bidirectional(model: nn.Module) -> None:
    """Raises ConfigError naming the class unless every layer lets a token see the one after it, and none lets it see padding.

    Costs a forward of the decoder over twelve tokens, and one backward a layer.
    """
    decoder = decoder_of(model)
    blind = _blind_layers(decoder)
    if blind:
        raise ConfigError(_refusal(decoder, blind))
    if _sees_padding(decoder):
        raise ConfigError(
            f"{_name(decoder)} lets tokens see padding once its attention is bidirectional: vectors would depend on the batch; "
            "set bidirectional to false"
        )


def check_causal(model: nn.Module) -> None:
    """Raises ConfigError unless no layer lets a token see the one after it."""
    decoder = decoder_of(model)
    if len(_blind_layers(decoder)) < len(decoder_layers(model)):
        raise ConfigError(f"{_name(decoder)} is not causal in every layer; its configuration says so. Set bidirectional to true")


def decoder_of(model: nn.Module) -> nn.Module:
    """The text decoder within a model of transformers, wrapped by PEFT or not: the module that has `layers` and makes their masks."""
    unwrapped = _unwrapped(model)
    decoder = unwrapped.get_decoder() if hasattr(unwrapped, "get_decoder") else unwrapped
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ConfigError(f"{type(unwrapped).__name__} has no text decoder with layers; a decoder as Llama's, Qwen's or Gemma's is needed")
    return decoder  # type: ignore[no-any-return]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model's text decoder, the first one first."""
    layers: Any = decoder_of(model).layers
    return list(layers)


def _refusal(decoder: nn.Module, blind: list[int]) -> str:
    return (
        f"{_name(decoder)} stays causal in {len(blind)} of its {len(decoder_layers(decoder))} layers (the first is {min(blind)}): it honours neither "
        "is_causal=False nor a finished mask. Set bidirectional to false, or take another base model"
    )


def _name(decoder: nn.Module) -> str:
    return f"{type(decoder).__module__}.{type(decoder).__qualname__}"


def _unwrapped(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _configs(model: nn.Module, decoder: nn.Module) -> list[Any]:
    # The decoder's own is a copy of what is saved with the model around it; and PaliGemma's masks are made by that one.
    outer = _unwrapped(model).config
    return [outer, outer.get_text_config(), decoder.config]


def _blind_layers(decoder: nn.Module) -> list[int]:
    """The layers after which a token's state does not depend on what the next token was before: those that are causal.

    Exact: where nothing flows back the gradient is zero to the last bit. Layer by layer, because one bidirectional layer would
    let everything below it be seen.
    """
    layers: Any = decoder.layers
    blind: list[int] = []
    entered: dict[int, torch.Tensor] = {}

    def enter(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            given = args[0] if args else kwargs["hidden_states"]
            entered[index] = given.detach().requires_grad_()
            return ((entered[index], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": entered[index]})

        return hook

    def leave(index: int) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            states_BTD = output if isinstance(output, torch.Tensor) else output[0]
            (gradient_BTD,) = torch.autograd.grad(states_BTD[:, 1].float().abs().sum(), entered[index])
            if not gradient_BTD[:, 2].abs().sum() > 0:
                blind.append(index)
            rest = () if isinstance(output, torch.Tensor) else output[1:]
            return states_BTD.detach() if isinstance(output, torch.Tensor) else (states_BTD.detach(), *rest)

        return hook

    handles = [layer.register_forward_pre_hook(enter(index), with_kwargs=True) for index, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(leave(index)) for index, layer in enumerate(layers)]
    with _removed(handles), _quiet(decoder), torch.inference_mode(False), torch.enable_grad():
        _run(decoder, _embeddings(decoder), torch.ones(2, 6))
    return blind


def _sees_padding(decoder: nn.Module) -> bool:
    """Whether tokens change when what stands in padding does, on either side of them."""
    mask_BT = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    embeddings_BTD = _embeddings(decoder)
    other_BTD = torch.where(mask_BT[..., None].to(embeddings_BTD.device) == 1, embeddings_BTD, embeddings_BTD.flip(-1) + 1)
    with _quiet(decoder), torch.no_grad():
        first, second = (_run(decoder, given, mask_BT)[mask_BT.bool()] for given in (embeddings_BTD, other_BTD))
    return not torch.allclose(first, second, rtol=1e-3, atol=1e-3)


def _embeddings(decoder: nn.Module) -> torch.Tensor:
    """What six tokens of two rows are to the decoder, (2, 6, D): numbers of the size that its own embeddings have."""
    table: torch.Tensor = decoder.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    noise = torch.randn(2, 6, table.shape[1], generator=torch.Generator().manual_seed(0)).to(table.device, table.dtype)
    return noise * table[:1000].detach().float().std().clamp(min=1e-3).to(table.dtype)


def _run(decoder: nn.Module, embeddings_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    mask_BT = mask_BT.long().to(embeddings_BTD.device)
    states: torch.Tensor = decoder(inputs_embeds=embeddings_BTD, attention_mask=mask_BT, use_cache=False).last_hidden_state
    return states


def _finished_mask(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace a mask of tokens, (B, T), by one that says which token sees which, (B, 1, T, T), to be added to the scores."""
    mask_BT = kwargs.get("attention_mask")
    given = next((kwargs[name] for name in ("inputs_embeds", "input_ids") if kwargs.get(name) is not None), args[0] if args else None)
    if given is None or (mask_BT is not None and (not isinstance(mask_BT, torch.Tensor) or mask_BT.ndim != 2)):
        return args, kwargs
    rows, length = given.shape[:2]
    seen_BT = torch.ones(rows, length, dtype=torch.bool, device=given.device) if mask_BT is None else mask_BT.bool()
    dtype = next(decoder.parameters()).dtype
    scores = torch.zeros(rows, 1, length, length, dtype=dtype, device=given.device)
    return args, {**kwargs, "attention_mask": scores.masked_fill(~seen_BT[:, None, None], torch.finfo(dtype).min)}


@contextlib.contextmanager
def _quiet(decoder: nn.Module) -> Iterator[None]:
    """Without dropout, which would make two runs differ."""
    training = {module: module.training for module in decoder.modules()}
    decoder.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


@contextlib.contextmanager
def _removed(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
