"""The checks of a teacher, before anything of a run starts: it must read the student's very tokens.

    a folder        vocabularies are equal, id by id, and probing texts become the same ids
    a server        /tokenize makes the same ids of probing texts, and one prompt is scored
    a server that has no /tokenize: algorithm.teacher.tokenizer names a folder to compare with

A vocabulary that is padded to another size is no difference, since no token has these ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from areal_agents.chat.format import ChatFormat
from areal_agents.engines.openai.teacher import NoAnswer, ServedTeacher
from areal_agents.errors import ConfigError, EngineError, ModelError
from areal_agents.models import resolve
from areal_agents.settings.config import AlgorithmConfig, TrainConfig
from areal_agents.utils.short_text import short

_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs, 3.14159 times; isn't that so?",
    "  two  spaces,\ttabs\n\n and\r\nlines  ",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # ok\n",
    "Füße, naïve, Łódź, Ελληνικά, кириллица, العربية, עברית, हिन्दी, 中文字符, 日本語, 한국어, 🙂👩‍👩‍👧",
    "1234567890 0.001 1e-5 2,000,000 €5 50% <tag attr='x'/> https://example.org/a?b=c#d",
    '{"name": "add", "arguments": {"a": 1}}',
)
_WORDS = 2000
"""Tokens of the vocabulary that a server is asked for, spread over it."""


async def require_teacher(config: TrainConfig) -> None:
    """Raise ArealError where the teacher, if there is one, cannot score the student's tokens."""
    t = config.algorithm.teacher
    if not t.model:
        return
    student = ChatFormat.load(resolve(config.model.path), config.model.chat).tokenizer
    if not t.url:
        folder = _found(t.model, "algorithm.teacher.model")
        _require_same(student, folder, "algorithm.teacher.model")
        _require_context(folder, config.model.max_context)
        return
    served = ServedTeacher(t, known=len(student))
    async with served.client() as client:
        await _require_served(served, client, config)
        if not await _tokenizes_alike(served, client, student, config):
            if not t.tokenizer:
                raise ConfigError(
                    f"{served.name} has no /tokenize to ask, so whether its tokenizer is the student's is not known: "
                    "name a folder with the teacher's tokenizer in algorithm.teacher.tokenizer, or serve it with vLLM"
                )
            _require_same_of_server(student, t.tokenizer)
        ids = student.encode(_TEXTS[0], add_special_tokens=False)
        await served.score(client, ids)


def with_teacher_found(algorithm: AlgorithmConfig) -> AlgorithmConfig:
    """Return the settings with a teacher's folder as a whole path, since a learner elsewhere has another current one.

    A name is left to the learner's own machine to resolve.
    """
    t = algorithm.teacher
    if t.url or not t.model or not (folder := Path(t.model).expanduser()).is_dir():
        return algorithm
    return algorithm.model_copy(update={"teacher": t.model_copy(update={"model": str(folder.absolute())})})


def _found(name: str, setting: str) -> Path:
    try:
        return resolve(name)
    except ModelError as error:
        raise ModelError(f"{setting}: {error}") from error


def difference(student: Any, teacher: Any) -> str | None:
    """Return in which way two tokenizers differ, or None where they give all texts the same ids.

    Which tokens begin or end a text is no difference: a teacher scores ids, and writes nothing.
    """
    own, other = student.get_vocab(), teacher.get_vocab()
    if own != other:
        wrong = sorted(own.items() ^ other.items(), key=lambda item: (item[1], item[0]))
        token = wrong[0][0]
        return (
            f"{len({name for name, _ in wrong})} tokens differ, as {token!r}, which is "
            f"{_id(own, token)} of the student and {_id(other, token)} of the teacher"
        )
    if student.get_added_vocab() != teacher.get_added_vocab():
        token = sorted(student.get_added_vocab().items() ^ teacher.get_added_vocab().items())[0][0]
        return f"{token!r} is a special token of one alone"
    for text in probing_texts(student):
        if (a := student.encode(text, add_special_tokens=False)) != (
            b := teacher.encode(text, add_special_tokens=False)
        ):
            return _shown(text, a, b)
    return None


def probing_texts(student: Any) -> list[str]:
    """Return texts that tell tokenizers apart: of many kinds, with each special token, and with words of theirs."""
    vocabulary = student.get_vocab()
    special = sorted(student.get_added_vocab())
    step = max(1, len(vocabulary) // _WORDS)
    words = [student.decode([i]) for i in sorted(vocabulary.values())[::step]]
    lines = [" ".join(words[i : i + 50]) for i in range(0, len(words), 50)]
    return [*_TEXTS, *(f"a{token}b {token}" for token in special), *lines]


def _require_same(student: Any, folder: Path, setting: str) -> None:
    try:
        found = difference(student, ChatFormat.load(folder).tokenizer)
    except ModelError as error:
        raise ConfigError(f"{setting}: {error}") from error
    if found is not None:
        raise ConfigError(
            f"{setting}: the tokenizer of {folder} is not the student's: {found}. A teacher scores the student's own "
            "tokens, so both must be of one family with one tokenizer"
        )


def _require_same_of_server(student: Any, name: str) -> None:
    """Compare with the folder that the settings name, which may hold no weights."""
    setting, folder = "algorithm.teacher.tokenizer", Path(name).expanduser()
    _require_same(student, folder if folder.is_dir() else _found(name, setting), setting)


def _require_context(folder: Path, max_context: int) -> None:
    sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    said = (sizes.get("text_config") or sizes).get("max_position_embeddings")
    if isinstance(said, int) and said < max_context:
        raise ConfigError(
            f"algorithm.teacher.model: {folder} has a context of {said} tokens, under model.max_context = {max_context}"
        )


async def _require_served(served: ServedTeacher, client: httpx.AsyncClient, config: TrainConfig) -> None:
    """Raise ConfigError where the server does not have the model, or not with context enough."""
    t = config.algorithm.teacher
    try:
        answer = await served.ask(client, "GET", served.url("models"))
    except NoAnswer as error:
        raise ConfigError(f"{served.name} does not answer: {error}") from error
    if answer.status != 200:
        why = " (algorithm.teacher.api_key_env)" if answer.status in (401, 403) else ""
        raise ConfigError(f"{served.root}/models answers {served.told(answer)}{why}")
    try:
        models = {m["id"]: m for m in json.loads(answer.raw)["data"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{served.root}/models lists no models: is algorithm.teacher.url right?") from error
    if models and t.model not in models:
        raise ConfigError(f"algorithm.teacher.model = {t.model!r}: {served.root} serves {short(list(models))}")
    longest = models.get(t.model, {}).get("max_model_len")
    if isinstance(longest, int) and longest <= config.model.max_context:
        raise ConfigError(
            f"{served.name} takes {longest} tokens, and must take one more than model.max_context = "
            f"{config.model.max_context} (it samples one token behind what it scores): serve it with a longer "
            "context (areal-agents serve --max-context, vLLM's --max-model-len), or lower model.max_context"
        )


async def _tokenizes_alike(served: ServedTeacher, client: httpx.AsyncClient, student: Any, config: TrainConfig) -> bool:
    """Say whether the server has told of its tokenizer that it is the student's.

    False where it has nothing to ask. Raises ConfigError where it is another one.
    """
    for text in probing_texts(student):
        body = {"model": config.algorithm.teacher.model, "prompt": text, "add_special_tokens": False}
        try:
            answer = await served.post(client, served.tokenize_url, body)
        except EngineError as error:
            if any(f": {code} " in str(error) for code in (404, 405, 501)):
                return False
            raise
        ids = answer.get("tokens") if isinstance(answer, Mapping) else None
        if not isinstance(ids, list):
            return False
        if ids != (own := student.encode(text, add_special_tokens=False)):
            raise ConfigError(f"{served.name} has another tokenizer than the student: {_shown(text, own, ids)}")
    return True


def _id(vocabulary: Mapping[str, int], token: str) -> str:
    return f"id {vocabulary[token]}" if token in vocabulary else "no token"


def _shown(text: str, own: list[int], other: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))
    part = slice(at, at + 4)
    return f"{text[:60]!r} becomes {own[part]} … from token {at} on, and {other[part]} … of the teacher"
