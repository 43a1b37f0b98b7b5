"""Count the steps of an engine that generates with carry-over, from the lengths of the responses alone.

A step samples one token of every running response. A response takes a free slot, oldest first, and keeps it until it
has ended or the call is interrupted. What a rollout holds is decided by the package's own pool and release rule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tic_grpo_trl.carry_over.pool import Group, Pool, Response


@dataclass(frozen=True)
class Rollout:
    """
    Describe one generation call and the rollout that it returned.

    Responses are listed by group, oldest group first. The age of a response is the number of rollouts from the one in
    which its first token was sampled to the one that trains on it, its span the same for its first and last token.
    """

    slots: int
    batches: list[tuple[int, int]]  # (steps, running responses) between two changes of what is running
    prefilled_again: int  # tokens of interrupted responses, when they took a slot again
    groups: list[int]  # their numbers
    late: list[int]  # of each group: rollouts since its own, below 0 for a group that is early
    lengths: list[int]
    ages: list[int]
    spans: list[int]

    @property
    def steps(self) -> int:
        return sum(steps for steps, _ in self.batches)

    @property
    def sampled(self) -> int:
        """Tokens sampled in this call, whichever rollout they are trained on in."""
        return sum(steps * running for steps, running in self.batches)

    @property
    def occupancy(self) -> float:
        """Share of the slots that sampled a token, over all steps."""
        return self.sampled / (self.slots * self.steps) if self.steps else 1.0


def generate(pool: Pool, slots: int, length: Callable[[Group, int], int]) -> Rollout:
    """Run one generation call on a pool, until the release rule is satisfied, and take its rollout out of the pool.

    `length` gives the number of tokens of a group's i-th response, if this call wrote it to its end. At least as many
    groups as a rollout holds must have been admitted.
    """
    waiting = [
        (each, length(group, index))
        for group in pool.groups
        for index, each in enumerate(group.responses)
        if not each.finished
    ]
    running: list[tuple[Response, int]] = []
    batches, prefilled_again = [], 0
    while pool.chosen() is None:
        started, waiting = waiting[: slots - len(running)], waiting[slots - len(running) :]
        prefilled_again += sum(len(each.tokens) for each, _ in started)
        running += started
        steps = min(end - len(each.tokens) for each, end in running)
        batches.append((steps, len(running)))
        for each, end in running:
            each.write([0] * steps, [0.0] * steps)
            each.finished = len(each.tokens) == end
        running = [(each, end) for each, end in running if not each.finished]
    call = pool.call
    groups = pool.release()
    responses = [each for group in groups for each in group.responses]
    return Rollout(
        slots=slots,
        batches=batches,
        prefilled_again=prefilled_again,
        groups=[group.number for group in groups],
        late=[call - group.number // pool.prompts for group in groups],
        lengths=[len(each.tokens) for each in responses],
        ages=[call - each.versions[0] for each in responses],
        spans=[each.versions[-1] - each.versions[0] for each in responses],
    )


def most_groups(prompts_per_rollout: int, max_carry_over: int, oversampling: float) -> int:
    """Return how many groups may be begun and not trained on; one rollout of them if nothing is carried over."""
    return int(oversampling * prompts_per_rollout) if max_carry_over else prompts_per_rollout


def simulate(
    lengths_of_groups: Sequence[Sequence[int]],
    slots: int,
    prompts_per_rollout: int,
    max_carry_over: int,
    oversampling: float = 2.0,
) -> list[Rollout]:
    """Simulate the generation calls of a whole run.

    Args:
        lengths_of_groups: tokens, 1 or more, of each response of each group, in the order of the prompts. All groups
            have as many responses, and together they make whole rollouts.
        slots: responses that the engine runs at once.
        prompts_per_rollout: groups of a rollout.
        max_carry_over: how many rollouts later than its own a group may be trained on; 0 waits for every response.
        oversampling: rollouts' worth of groups that are begun and not trained on, 1 or more; without effect if
            `max_carry_over` is 0.

    Returns:
        The rollouts, in order. Every group is in exactly one of them.

    Raises:
        ValueError: where the arguments break one of these rules.
    """
    sizes = {len(lengths) for lengths in lengths_of_groups}
    if len(sizes) != 1 or len(lengths_of_groups) % prompts_per_rollout:
        raise ValueError(
            f"{len(lengths_of_groups)} groups of {sorted(sizes)} responses make no whole rollouts of "
            f"{prompts_per_rollout} groups: pass groups of one size, a multiple of prompts_per_rollout."
        )
    shortest = min(map(min, lengths_of_groups))
    if min(shortest, slots, oversampling) < 1 or max_carry_over < 0:
        raise ValueError(
            "Lengths, slots and oversampling must be at least 1 and max_carry_over at least 0, got "
            f"a length of {shortest}, slots={slots}, oversampling={oversampling}, max_carry_over={max_carry_over}."
        )
    pool = Pool(prompts_per_rollout, max_carry_over)
    limit = most_groups(prompts_per_rollout, max_carry_over, oversampling)
    rollouts: list[Rollout] = []
    while len(rollouts) < len(lengths_of_groups) // prompts_per_rollout:
        for lengths in lengths_of_groups[pool.admitted :][: limit - len(pool.groups)]:
            pool.admit(Group(pool.admitted, None, {}, [], [Response() for _ in lengths]))
        rollouts.append(generate(pool, slots, lambda group, index: lengths_of_groups[group.number][index]))
    return rollouts
