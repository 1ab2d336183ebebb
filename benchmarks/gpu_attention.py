"""The learner's attention: which kernel takes it, whether it is right, how fast it is, and what fits.

Every row has ``what``:

    kernel      ``tree_attention`` alone on random numbers, against a dense mask in fp64: the relative error of the
                output and of each gradient
    gradient    the decoder's gradient over a group of rows in bf16, against fp32 without a tree; beside it the error
                of transformers' own attention in bf16, without a tree
    pack        forward and backward of one pack
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_models import (
    free,
    kernels,
    operations,
    peak_gib,
    random_model,
    random_rows,
    reset_peak,
    seconds,
    sizes,
    unless_too_large,
)
from gpu_parts import Row, Settings, main
from torch import Tensor, nn

from areal_agents.learner.forward import Decoder
from areal_agents.learner.packing import Pack, pack_rows
from areal_agents.learner.tree_attention import TREE, Tree, tree_attention


def pack_of(tokens: int, vocabulary: int, *, grouped: bool) -> Pack:
    """Return one pack of ``tokens``: a single row, or a group whose prompt is half of them."""
    rows = random_rows(tokens, vocabulary, grouped=grouped, prompt=tokens // 2 if grouped else tokens // 8)
    (pack,) = pack_rows([row.ids for row in rows], token_budget=tokens)
    return pack


def kernel_rows(device: torch.device, tokens: int, heads: tuple[int, int], size: int) -> Iterator[Row]:
    """Compare ``tree_attention`` over a group with softmax(QKᵀ)V in fp64, mask and all."""
    pack = pack_of(tokens, 50, grouped=True)
    torch.manual_seed(0)
    shapes = [(1, n, pack.tokens, size) for n in (heads[0], heads[1], heads[1])]
    exact = [torch.randn(shape, device=device, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = torch.randn(1, pack.tokens, heads[0], size, device=device, dtype=torch.float64)
    wanted = torch.zeros_like(weight)
    for i, segment in enumerate(pack.segments):
        path = [pack.segments[p] for p in (*segment.path, i)]
        places = torch.cat([torch.arange(s.start, s.stop, device=device) for s in path])
        own = torch.arange(segment.start, segment.stop, device=device)
        query, key, value = exact[0][:, :, own], *(x[:, :, places] for x in exact[1:])
        key, value = (x.repeat_interleave(heads[0] // heads[1], dim=1) for x in (key, value))
        visible = torch.ones(len(own), len(places), dtype=torch.bool, device=device).tril(len(places) - len(own))
        scores = (query @ key.transpose(2, 3) * size**-0.5).masked_fill(~visible, float("-inf"))
        wanted[:, own] = (scores.softmax(-1) @ value).transpose(1, 2)
    wanted_grads = torch.autograd.grad((wanted * weight).sum(), exact)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
        # As in the model: query and key come in fp32, whatever the value's format.
        query, key, value = inputs[0].float(), inputs[1].float(), inputs[2]
        found, _ = tree_attention(
            nn.Identity(), query, key, value, None, scaling=size**-0.5, tree=Tree(pack, device)
        )  # fmt: skip
        grads = torch.autograd.grad((found.float() * weight.float()).sum(), inputs)
        yield {
            "what": "kernel", "format": str(dtype).removeprefix("torch."), "tokens": pack.tokens, "heads": heads,
            "head_dim": size, "output_error": off(found, wanted),
            "gradient_errors": [off(a, b) for a, b in zip(grads, wanted_grads, strict=True)],
        }  # fmt: skip


def off(found: Tensor, wanted: Tensor) -> float:
    """Return ‖found − wanted‖ / ‖wanted‖."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float(f"{float((found - wanted).norm() / wanted.norm()):.3g}")


def gradient_row(device: torch.device, name: str, tokens: int) -> Row:
    """Compare the gradient over a group: in bf16 with the tree and without, each with fp32 without."""
    # Wide weights, or attention would be nearly uniform and its errors hardly seen.
    model = random_model(name, device, num_hidden_layers=2, initializer_range=0.1)
    decoder = Decoder(model, torch.float32)
    ids = [row.ids for row in random_rows(tokens, model.config.vocab_size, grouped=True, prompt=tokens // 2)]
    torch.manual_seed(1)
    weights = [torch.randn(len(row), model.config.hidden_size, device=device) for row in ids]

    def gradient(dtype: torch.dtype, *, tree: bool) -> Tensor:
        decoder.dtype, decoder.shared = dtype, tree
        model.set_attn_implementation(TREE if tree else "sdpa")
        model.zero_grad(set_to_none=True)
        for pack in pack_rows(ids, token_budget=tokens if tree else len(ids[0]), shared=tree):
            with decoder.autocast():
                hidden = decoder.hidden(pack)
            parts = [
                (hidden[torch.from_numpy(at).to(device)].float() * weights[i]).sum()
                for i, at in zip(pack.rows, pack.at, strict=True)
            ]
            torch.autograd.backward(parts)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    layout = decoder.shared
    exact = gradient(torch.float32, tree=False)
    return {
        "what": "gradient", "model": name, "layers": 2, "tokens": tokens, "tree_chosen": layout,
        "fp32_tree": off(gradient(torch.float32, tree=True), exact),
        "bf16_tree": off(gradient(torch.bfloat16, tree=True), exact),
        "bf16_transformers": off(gradient(torch.bfloat16, tree=False), exact),
    }  # fmt: skip


def pack_row(device: torch.device, name: str, decoder: Decoder, tokens: int, *, grouped: bool, repeats: int) -> Row:
    """Time forward and backward of one pack, its head left out."""
    pack = pack_of(tokens, decoder.model.config.vocab_size, grouped=grouped)
    row: Row = {
        "what": "pack", "model": name, "tokens": pack.tokens, "rows": len(pack.rows), "fits": False,
        "tree_chosen": decoder.shared,
    }  # fmt: skip

    def work() -> None:
        with decoder.autocast():
            hidden = decoder.hidden(pack)
        hidden.backward(torch.ones_like(hidden))

    def measured() -> Row:
        reset_peak(device)
        taken = seconds(device, work, repeats=repeats)
        peak = peak_gib(device)
        slowest, busy = kernels(device, work)
        return {
            "fits": True, "seconds": round(taken, 4), "tokens_per_s": round(pack.tokens / taken),
            "tflops": round(operations(decoder.model.config, [pack], 0) / taken / 1e12, 3), "peak_gib": peak,
            "kernel_seconds": round(busy, 4), "kernels": slowest,
        }  # fmt: skip

    found = unless_too_large(measured)
    decoder.model.zero_grad(set_to_none=True)
    return row | (found or {})


def rows(settings: Settings) -> Iterator[Row]:
    device = torch.device(settings.device)
    on_gpu = device.type == "cuda"
    shapes = [((4, 2), 16)] if settings.tiny else [((14, 2), 64), ((12, 2), 128)]
    for heads, size in shapes:
        yield from kernel_rows(device, 160 if settings.tiny else 2048, heads, size)
    yield gradient_row(device, "tiny" if settings.tiny else "0.5B", 320 if settings.tiny else 2048)
    for name in sizes(settings, ("1.5B", "0.5B", "3B"), ("1.5B",)):
        decoder = Decoder(
            random_model(name, device), torch.bfloat16 if on_gpu else torch.float32
        )  # fmt: skip
        for tokens in (320,) if settings.tiny else (4096, 16_384) if settings.quick else (4096, 8192, 16_384):
            for grouped in (False, True):
                yield pack_row(device, name, decoder, tokens, grouped=grouped, repeats=1 if settings.tiny else 3)
        del decoder
        free(device)


if __name__ == "__main__":
    main(rows)
