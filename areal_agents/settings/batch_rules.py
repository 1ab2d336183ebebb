"""The rules between what a batch is made of and how it is trained on."""

from __future__ import annotations


def require_batch(
    *, groups: int, group_size: int, minibatches: int, dynamic_sampling: bool, normalize: str, kl_in_reward: bool
) -> None:
    """Raise ValueError where a batch cannot be trained on as the settings say.

    Args:
        groups: of a batch.
        group_size: episodes of a group, before any are lost.
        minibatches: optimizer steps a batch.
        dynamic_sampling: whether groups without signal are replaced.
        normalize: ``algorithm.normalize``.
        kl_in_reward: whether rewards pay for a divergence.
    """
    if minibatches > groups * group_size:
        raise ValueError(
            f"learner.minibatches = {minibatches}, but a batch has rollout.groups · rollout.group_size = "
            f"{groups * group_size} episodes, each of which is in one minibatch: lower learner.minibatches to that"
        )
    if not dynamic_sampling:
        return
    why = "rollout.dynamic_sampling = true replaces groups whose rewards give no signal"
    if kl_in_reward:
        raise ValueError(
            f"{why}, but with algorithm.kl.place = 'reward' what their tokens pay gives every group one: set place = "
            "'loss'"
        )
    if normalize != "none":
        raise ValueError(
            f"{why}, but with algorithm.normalize = {normalize!r} such a group trains too, by the batch's mean that is "
            "subtracted from it: set normalize = 'none', and let the estimator normalise"
        )
