"""A process that scores conversations with a reward model until its standard input ends.

The first JSON line in has the settings, and is answered by {ready} or {refused}. Every other one, {batch: [[{role,
content}, …], …]}, is answered by {scores: [{tokens, left_out, logits or long or error}, …]}. torch and transformers are
imported here alone.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from areal_agents.utils.parent import end_with_parent

Rows = Sequence[dict[str, str]]
_HALVES = re.compile("[\ud800-\udfff]")


class Refused(Exception):
    """The folder holds no reward model that can be used as it was asked for."""


class TemplateRefused(Exception):
    """The chat template cannot write the messages."""


class Scorer:
    """A reward model with its tokenizer."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Load the folder.

        Args:
            settings: the fields of ``server.WorkerSettings``.

        Raises:
            Refused: it is no such folder, or does not fit the settings.
        """
        import torch
        import transformers

        folder, dtype = settings["folder"], {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["precision"]]
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            self._model, found = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # a stranger's folder: each loader beneath has errors of its own
            raise Refused(f"{folder} cannot be loaded as a model of sequence classification: {error}") from error
        if missing := sorted(found["missing_keys"]):
            raise Refused(
                f"{folder} lacks the weights {', '.join(map(str, missing[:3]))}: a model without its trained head "
                "would score at random. Name a folder saved from AutoModelForSequenceClassification"
            )
        if not self._tokenizer.chat_template:
            raise Refused(f"{folder} has no chat template, which says how its model reads a conversation")
        self._model.to(settings["device"]).eval()
        self._cuts, self._softmax = settings["cuts"], settings["softmax"]
        self.index = self._label(settings["label"])
        self.positions = self._limit(settings["max_tokens"])
        template = str(self._tokenizer.chat_template)
        added = self._tokenizer.added_tokens_decoder.values()
        controls = {t.content for t in added if t.special or t.content in template} | set(
            self._tokenizer.all_special_tokens
        )
        self._controls = sorted((t for t in controls if len(t.strip()) > 1), key=len, reverse=True)

    def _label(self, name: str | None) -> int:
        config = self._model.config
        known = {str(label): int(i) for i, label in config.id2label.items()}
        if name is None and config.num_labels != 1:
            raise Refused(
                f"the model has {config.num_labels} labels ({', '.join(known)}): say which one is the reward (label=…)"
            )
        if name is not None and name not in known:
            raise Refused(f"the model has no label {name!r}: there are {', '.join(known)}")
        if self._softmax and config.num_labels == 1:
            raise Refused("a model of one output has no softmax: use raw or sigmoid")
        return known[name] if name is not None else 0

    def _limit(self, asked: int | None) -> int:
        said = [self._tokenizer.model_max_length, getattr(self._model.config, "max_position_embeddings", None)]
        limits = [int(n) for n in said if isinstance(n, int) and 0 < n < 10**9]
        for module in self._model.modules():  # RoBERTa's positions begin after that of its padding
            table: Any = getattr(module, "position_embeddings", None)
            if getattr(table, "padding_idx", None) is not None:
                limits.append(table.num_embeddings - table.padding_idx - 1)
        if asked is None and not limits:
            raise Refused("the model's folder does not say how many positions it has: give max_tokens")
        if asked is not None and limits and asked > min(limits):
            raise Refused(f"max_tokens = {asked} is more than the model's {min(limits)} positions")
        return asked if asked is not None else min(limits)

    def batch(self, conversations: Sequence[Rows]) -> list[dict[str, Any]]:
        """Score conversations, or say of each how much too long it is."""
        out: list[dict[str, Any]] = []
        ready: list[tuple[int, list[int]]] = []
        for i, rows in enumerate(conversations):
            try:
                ids = self._ids(rows)
            except TemplateRefused as error:
                out.append({"error": f"the reward model's chat template refuses the messages: {error}"})
                continue
            left_out = max(0, len(ids) - self.positions)
            out.append({"tokens": len(ids), "left_out": left_out})
            if left_out and not self._cuts:
                out[i]["long"] = True
                continue
            if left_out:  # both ends stay: the template's opening, and what the last token reads
                head = self.positions // 2
                ids = ids[:head] + ids[head + left_out :]
            ready.append((i, ids))
        pad = self._model.config.pad_token_id
        groups = [[entry] for entry in ready] if pad is None else [ready] if ready else []  # no padding: one by one
        for group in groups:
            for (i, _), logits in zip(group, self._logits([ids for _, ids in group], pad or 0), strict=True):
                out[i]["logits"] = logits
        return out

    def _ids(self, rows: Rows) -> list[int]:
        plain = [{"role": _sent(row["role"]), "content": self._without_controls(row["content"])} for row in rows]
        try:
            text: str = self._tokenizer.apply_chat_template(plain, tokenize=False)
        except Exception as error:  # a template is a program, and fails as one: its error is told, not the worker lost
            raise TemplateRefused(str(error)) from error
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _without_controls(self, text: str) -> str:
        """Break up control tokens that somebody wrote into a message: they must not open a turn of their own."""
        text, found = _sent(text), True
        while found:
            found = False
            for token in self._controls:
                if token in text:
                    first = len(token) - len(token.lstrip()) + 1
                    text, found = text.replace(token, token[:first] + " " + token[first:]), True
        return text

    def _logits(self, ids: Sequence[list[int]], pad: int) -> list[list[float]]:
        import torch

        width = max(map(len, ids))
        rows = torch.tensor([row + [pad] * (width - len(row)) for row in ids], device=self._model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=self._model.device)
        with torch.inference_mode():
            logits = self._model(input_ids=rows, attention_mask=mask).logits
        found: list[list[float]] = logits.float().cpu().tolist()
        return found


def _sent(text: str) -> str:
    """Return ``text`` with a mark for each half of a surrogate pair, which no tokenizer takes."""
    return _HALVES.sub("\ufffd", text)


def main() -> None:
    end_with_parent()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints must not break a reply
    first = sys.stdin.readline()
    if not first:
        return
    settings = json.loads(first)
    _set_up(settings["threads"])
    try:
        scorer = Scorer(settings)
    except Refused as error:
        _reply(out, {"refused": str(error)})
        return
    _reply(out, {"ready": True, "positions": scorer.positions, "index": scorer.index})
    for line in sys.stdin:
        _reply(out, {"scores": scorer.batch(json.loads(line)["batch"])})


def _set_up(threads: int) -> None:
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _reply(out: Any, row: dict[str, Any]) -> None:
    out.write(json.dumps(row) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
