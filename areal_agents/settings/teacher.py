"""The settings of on-policy distillation: a teacher scores the tokens that the student sampled."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field, model_validator

from areal_agents.settings.section import Count, Positive, Section


class TeacherConfig(Section):
    model: str = ""
    """The teacher: a folder, ``smollm2`` or a hub id, loaded frozen beside the learner; with ``url`` the name that the
    server knows it by. Its tokenizer must be the student's. Empty: there is none."""
    url: str = ""
    """OpenAI-compatible server of the teacher, up to ``/v1``, which returns log-probabilities of prompts as vLLM does.
    They are at temperature 1, so ``rollout.temperature`` must be 1. Empty: it is loaded beside the learner."""
    coef: Positive = 1.0
    """c: each sampled token's advantage gets c·(log teacher − log μ), μ being the policy that sampled it."""
    rewards: bool = True
    """Add that to the advantages of the rewards; false: the teacher alone trains, and no estimator is asked."""
    tokenizer: str = ""
    """Folder with the tokenizer of a server's teacher, compared with the student's where the server has no
    ``/tokenize`` to ask."""
    api_key_env: str = ""
    """Environment variable with the server's key; empty: none is sent."""
    timeout: Positive = 120.0
    """Seconds one request to the server may take."""
    max_retries: int = Field(default=5, ge=0)
    """Further tries of a request that failed; after them the run stops, and can be resumed."""
    concurrency: Count = 8
    """Most requests to the server at once."""

    @model_validator(mode="after")
    def _check(self) -> TeacherConfig:
        if not self.model:
            self._refuse_beside(tuple(type(self).model_fields), "without a teacher: set algorithm.teacher.model")
        if not self.url:
            of_server = ("tokenizer", "api_key_env", "timeout", "max_retries", "concurrency")
            self._refuse_beside(of_server, "is a server's, and algorithm.teacher.url is empty: set it")
        return self

    def _refuse_beside(self, names: tuple[str, ...], why: str) -> None:
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"algorithm.teacher.{name} = {getattr(self, name)!r} {why}, or leave it out")

    def problems(self, *, kl_in_reward: bool, critic: bool, normalize: str) -> Iterator[str]:
        """Yield the reasons against the other settings of the algorithm where the teacher alone trains.

        Args:
            kl_in_reward: whether rewards pay for a divergence.
            critic: whether there is a critic.
            normalize: ``algorithm.normalize``.
        """
        if not self.alone:
            return
        why = "algorithm.teacher.rewards = false leaves the rewards out"
        if kl_in_reward:
            yield f"{why}, and algorithm.kl.place = 'reward' changes nothing else: set it to 'loss'"
        if critic:
            yield f"{why}, so the critic has nothing to value: set algorithm.critic.kind = 'none'"
        if normalize != "none":
            yield f"{why}, and algorithm.normalize = {normalize!r} normalises nothing else: set it to 'none'"

    def require_sampling(self, *, temperature: float, dynamic_sampling: bool) -> None:
        """Raise ValueError where episodes are sampled in a way that the teacher cannot score, or train on.

        Args:
            temperature: that the episodes are sampled at.
            dynamic_sampling: whether groups without signal are replaced.
        """
        if self.url and temperature != 1.0:
            raise ValueError(
                f"rollout.temperature = {temperature:g}: a server's log-probabilities of prompts are at temperature 1, "
                "and the teacher must be compared at the student's: set it to 1, or load the teacher beside the "
                "learner (leave algorithm.teacher.url out)"
            )
        if self.alone and dynamic_sampling:
            raise ValueError(
                "rollout.dynamic_sampling = true replaces groups whose rewards give no signal, but with "
                "algorithm.teacher.rewards = false the teacher gives every group one: leave it out"
            )

    @property
    def alone(self) -> bool:
        """Whether the rewards are left out."""
        return bool(self.model) and not self.rewards
