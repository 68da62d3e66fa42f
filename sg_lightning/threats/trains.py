"""Moving spikes along their lines: exact sizes, exact optima for single spikes, and the best-first schedule for packets.

A line is one channel or pixel over time, a packet one non-zero bin with its whole value. No two packets share a bin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sg_lightning.threats.geometry import top_k

_LAST = torch.iinfo(torch.int64).max  # rank of what is not allowed
_CELLS = 1 << 24  # table entries held at once


def lines(x: Tensor) -> Tensor:
    """View (B, T, ...) as lines (B, N, T)."""
    return x.reshape(x.shape[0], x.shape[1], -1).transpose(1, 2)


def raster(found: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`lines`."""
    return found.transpose(1, 2).reshape(like.shape).to(like.dtype)


def least_shifts(after: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Match packets of equal value in the order of time; return the steps (B, N, T) each moves, and if all match (B,).

    Crossed pairs never cost less than uncrossed ones, in their sum or their maximum, so this matching is the cheapest.
    """
    steps = before.shape[-1]
    time = torch.arange(steps, device=before.device)
    keys = [torch.where(z != 0, z.long() * steps + time, _LAST).sort(-1).values for z in (after, before)]
    matched = (keys[0] // steps == keys[1] // steps).flatten(1).all(1)
    return (keys[0] - keys[1]).abs(), matched


# --- packets, best first ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packets:
    """The packets of a batch, by sample, line and time, each (P,); ``line`` counts over the whole batch."""

    sample: Tensor
    line: Tensor
    time: Tensor
    value: Tensor
    shape: torch.Size  # (B, N, T)

    @classmethod
    def of(cls, trains: Tensor) -> Packets:
        """List the packets of (B, N, T)."""
        sample, line, time = trains.nonzero(as_tuple=True)
        return cls(sample, sample * trains.shape[1] + line, time, trains[sample, line, time], trains.shape)

    def select(self, mask: Tensor) -> Packets:
        """Return the packets of the samples where ``mask`` (B,) is true, in the same order."""
        kept = mask[self.sample]
        sample = (mask.cumsum(0) - 1)[self.sample[kept]]
        width = self.shape[1]
        shape = torch.Size((int(mask.sum()), width, self.shape[2]))
        return Packets(sample, sample * width + self.line[kept] % width, self.time[kept], self.value[kept], shape)

    def spread(self, mass: Tensor, target: Tensor) -> Tensor:
        """Add ``mass`` (P, K) at the times ``target`` (P, K), nothing outside the raster; differentiable in the mass."""
        inside = (target >= 0) & (target < self.shape[2])
        cell = self.line.unsqueeze(1) * self.shape[2] + target
        flat = mass.new_zeros(self.shape.numel())
        return flat.index_add(0, cell[inside], mass[inside]).view(self.shape)

    def at(self, time: Tensor) -> Tensor:
        """Put every packet at its ``time`` (P,): (B, N, T)."""
        return self.spread(self.value.unsqueeze(1), time.unsqueeze(1))

    def gather(self, trains: Tensor, target: Tensor) -> Tensor:
        """Read (B, N, T) at the times ``target`` (P, K) of each packet's line; outside the raster at its edge."""
        return trains.reshape(-1, self.shape[2])[self.line.unsqueeze(1), target.clamp(0, self.shape[2] - 1)]


def shifted(packets: Packets, reach: int) -> Tensor:
    """Return the times (P, 2 reach + 1) that shifts of -reach, ..., reach lead to."""
    return packets.time.unsqueeze(1) + torch.arange(-reach, reach + 1, device=packets.time.device)


def anywhere(packets: Packets) -> Tensor:
    """Return all times (P, T)."""
    return torch.arange(packets.shape[2], device=packets.time.device).expand(len(packets.time), -1)


def place_within_reach(packets: Packets, score: Tensor, target: Tensor) -> Tensor:
    """Place packets one after the other, in each line the best score that is still free first; return times (P,).

    ``score`` and ``target`` are (P, K). A bin is free once its packet has left it; a packet may always stay.
    """
    return _place(packets, score, target, once=False)[0]


def place_within_budget(packets: Packets, score: Tensor, cost: Tensor, limit: Tensor) -> Tensor:
    """Go through all moves of a sample from the best score (P, T) down, each once, and make those to free bins.

    Stops before the first move whose ``cost`` (P, T) would pass ``limit`` (B,); of equal scores the shorter move is
    first. Returns times (P,).
    """
    target = anywhere(packets)
    distance = (target - packets.time.unsqueeze(1)).abs()
    nearer = score + 1e-6 * (packets.shape[2] - 1 - distance)
    time, rank = _place(packets, torch.where(distance == 0, -torch.inf, nearer), target, once=True)
    # Bins are only fought for within a line, so the moves of all lines, merged by rank, are those of the whole sample.
    spent = torch.where(rank < _LAST, cost.gather(1, time.unsqueeze(1)).squeeze(1), 0.0)
    order = rank.argsort(stable=True)
    order = order[packets.sample[order].argsort(stable=True)]
    total = spent[order].cumsum(0)
    size = torch.bincount(packets.sample, minlength=packets.shape[0])
    before = torch.cat([total.new_zeros(1), total])[size.cumsum(0) - size]
    affordable = torch.zeros_like(rank, dtype=torch.bool)
    affordable[order] = total - before[packets.sample[order]] <= limit[packets.sample[order]]
    return torch.where(affordable & (rank < _LAST), time, packets.time)


def _place(packets: Packets, score: Tensor, target: Tensor, *, once: bool) -> tuple[Tensor, Tensor]:
    """Return the time of each packet and the rank of its move, ``_LAST`` if it has none.

    With ``once`` a move that was not possible when its turn came is not looked at again.
    """
    order = score.flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device)).view_as(score)
    inside = (target >= 0) & (target < packets.shape[2]) & (score > -torch.inf)
    rank = torch.where(inside, rank, _LAST)
    own = target == packets.time.unsqueeze(1)
    line = packets.line
    taken = torch.zeros(packets.shape[0] * packets.shape[1], packets.shape[2], dtype=torch.bool, device=line.device)
    taken[line, packets.time] = True
    time, done = packets.time.clone(), torch.full_like(packets.time, _LAST)
    cursor = torch.full((len(taken),), -1, dtype=torch.int64, device=line.device)
    column = target.clamp(0, packets.shape[2] - 1)
    while True:
        open_ = (done == _LAST).unsqueeze(1) & (own | ~taken[line.unsqueeze(1), column])
        if once:
            open_ &= rank > cursor[line].unsqueeze(1)
        best = torch.where(open_, rank, _LAST).amin(1)
        first = torch.full_like(cursor, _LAST).scatter_reduce(0, line, best, "amin")
        chosen = ((best == first[line]) & (best < _LAST)).nonzero().squeeze(1)
        if len(chosen) == 0:
            return time, done
        done[chosen] = cursor[line[chosen]] = best[chosen]
        time[chosen] = target.flatten()[order[best[chosen]]]
        taken[line[chosen], packets.time[chosen]] = False
        taken[line[chosen], time[chosen]] = True


def place_at_favourite(packets: Packets, score: Tensor, target: Tensor) -> Tensor:
    """Send every packet where its score (P, K) is highest, if no packet stood there; the others stay. Times (P,).

    Where several want one bin the highest score gets it.
    """
    line, steps = packets.line, packets.shape[2]
    best, choice = score.max(1)
    wish = target.gather(1, choice.unsqueeze(1)).squeeze(1)
    taken = torch.zeros(packets.shape[0] * packets.shape[1], steps, dtype=torch.bool, device=line.device)
    taken[line, packets.time] = True
    cell = line * steps + wish.clamp(0, steps - 1)
    able = (wish >= 0) & (wish < steps) & ~taken.flatten()[cell]
    order = choice.argsort(stable=True)
    order = order[best[order].argsort(descending=True, stable=True)]
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    rank = torch.where(able, rank, _LAST)
    first = torch.full((taken.numel(),), _LAST, device=line.device).scatter_reduce(0, cell, rank, "amin")
    return torch.where(able & (first[cell] == rank), wish, packets.time)


# --- single spikes: exact optima --------------------------------------------------------------------------------------


def best_moves(spikes: Tensor, value: Tensor, limit: Tensor) -> Tensor:
    """Maximise the sum of ``value`` under the spikes (bool, all (B, N, T)) when ``limit`` (B,) of them may move; exact.

    The best r moves of a line take its r worst spikes to its r best free bins, and each adds no more than the one
    before, so the best moves of all lines together are the best of a sample.
    """
    low = torch.where(spikes, value, torch.inf).sort(dim=-1, stable=True)
    high = torch.where(spikes, -torch.inf, value).sort(dim=-1, descending=True, stable=True)
    gain = high.values - low.values
    moves = top_k(gain.flatten(1), limit.unsqueeze(1)).view_as(gain).bool()
    leave = torch.zeros_like(spikes).scatter(-1, low.indices, moves)
    enter = torch.zeros_like(spikes).scatter(-1, high.indices, moves)
    return (spikes & ~leave) | enter


def best_within_reach(spikes: Tensor, value: Tensor, reach: int) -> Tensor:
    """Maximise the sum of ``value`` under the spikes (bool, all (B, N, T)) when each may move ``reach`` steps; exact.

    Matched in the order of time, all spikes stay within reach if and only if, up to every step, at least those that
    stood ``reach`` steps earlier have come and at most those that stand ``reach`` steps later.
    """
    found = spikes.clone()
    busy = spikes.any(-1)
    if not bool(busy.any()):
        return found
    trains, worth = spikes[busy], value[busy]
    best = trains.clone()
    count = trains.sum(-1, keepdim=True)
    so_far = trains.cumsum(-1)
    step = torch.arange(spikes.shape[-1], device=spikes.device)
    least = torch.where(step >= reach, so_far[:, (step - reach).clamp_min(0)], 0)
    most = torch.where(step + reach < len(step), so_far[:, (step + reach).clamp_max(len(step) - 1)], count)
    for part in _parts(trains, 1):
        tables = _Tables(trains[part], worth[part], least[part], most[part], 0)
        best[part] = tables.train(torch.zeros(len(part), dtype=torch.int64, device=part.device))
    better = (worth * best).sum(-1) > (worth * trains).sum(-1)
    found[busy] = torch.where(better.unsqueeze(-1), best, trains)
    return found


def best_within_steps(spikes: Tensor, value: Tensor, limit: Tensor) -> Tensor:
    """Maximise the sum of ``value`` under the spikes (bool, all (B, N, T)) when they may move ``limit`` (B,) steps in all.

    Exact: a table of each line by the steps it spends, then a knapsack over the lines of a sample.
    """
    steps, held = spikes.shape[-1], spikes.sum(-1, keepdim=True)
    step, so_far = torch.arange(steps, device=spikes.device), spikes.cumsum(-1)
    least, most = (held - (steps - 1 - step)).clamp_min(0), torch.minimum(held, step + 1)
    dearest = torch.maximum(so_far - least, most - so_far).sum(-1)  # (B, N), no train of the line spends more
    budget = torch.minimum(limit.long(), dearest.sum(1))
    width = min(int(budget.max()), int(dearest.max())) + 1
    per_sample = (int(budget.max()) + 1) * (spikes.shape[1] + width)
    found = []
    for part in torch.arange(len(spikes), device=spikes.device).split(max(1, _CELLS // per_sample)):
        found.append(_knapsack(spikes[part], value[part], least[part], most[part], budget[part], width))
    return torch.cat(found)


def _knapsack(trains: Tensor, value: Tensor, least: Tensor, most: Tensor, budget: Tensor, width: int) -> Tensor:
    """Share the budget (B,) among the lines, whose tables have ``width`` entries: 0, 1, ... steps spent."""
    if not bool(budget.any()):
        return trains
    busy = trains.any(-1)
    low, high, parts = least[busy], most[busy], _parts(trains[busy], width)
    tables = [_Tables(trains[busy][k], value[busy][k], low[k], high[k], width - 1) for k in parts]
    worth = value.new_full((*busy.shape, width), -torch.inf)
    worth[..., 0] = 0.0
    worth[busy] = torch.cat([table.worth for table in tables])
    total = value.new_full((len(trains), int(budget.max()) + 1), -torch.inf)
    total[:, 0] = 0.0
    spent = []
    for line in worth.unbind(1):  # best totals by the steps that the lines so far spend
        window = torch.cat([total.new_full((len(total), width - 1), -torch.inf), total], dim=1).unfold(1, width, 1)
        best = (window.flip(2) + line.unsqueeze(1)).max(2)  # of equal ones the fewest steps
        total = best.values
        spent.append(best.indices)
    affordable = torch.arange(total.shape[1], device=total.device) <= budget.unsqueeze(1)
    left = torch.where(affordable, total, -torch.inf).argmax(1, keepdim=True)
    shares = []
    for choice in reversed(spent):
        shares.append(choice.gather(1, left))
        left = left - shares[-1]
    share = torch.cat(shares[::-1], dim=1)[busy]
    found = trains.clone()
    found[busy] = torch.cat([table.train(share[part]) for table, part in zip(tables, parts, strict=True)])
    return found


def _parts(trains: Tensor, width: int) -> tuple[Tensor, ...]:
    """Split lines (L, T) so that their tables fit."""
    entries = trains.shape[-1] * (int(trains.sum(-1).max()) + 1 if len(trains) else 1) * width
    return torch.arange(len(trains), device=trains.device).split(max(1, _CELLS // entries))


class _Tables:
    """Best value of each line (L, T) by how many spikes have come and how many steps are spent, step by step.

    The spikes up to a step, seen against those that stood there, tell how many pass it, so the steps that a line
    spends are the sum of those differences.
    """

    def __init__(self, trains: Tensor, value: Tensor, least: Tensor, most: Tensor, steps: int) -> None:
        self.so_far = trains.cumsum(-1)
        self.steps = steps
        held = torch.arange(int(self.so_far[:, -1].max()) + 1, device=trains.device)
        spent = torch.arange(steps + 1, device=trains.device)
        best = value.new_full((len(trains), len(held), steps + 1), -torch.inf)
        best[:, 0, 0] = 0.0
        self.fired: list[Tensor] = []
        for step in range(trains.shape[1]):
            fire = torch.full_like(best, -torch.inf)
            fire[:, 1:] = best[:, :-1] + value[:, step, None, None]
            self.fired.append(fire > best)
            best = torch.maximum(fire, best)
            legal = (held >= least[:, step, None]) & (held <= most[:, step, None])
            best = torch.where(legal.unsqueeze(-1), best, -torch.inf)
            if steps:
                earlier = spent - (self.so_far[:, step, None] - held).abs().unsqueeze(-1)
                best = torch.where(earlier >= 0, best.gather(2, earlier.clamp_min(0)), -torch.inf)
        self.line = torch.arange(len(trains), device=trains.device)
        self.worth = best[self.line, self.so_far[:, -1]]

    def train(self, spent: Tensor) -> Tensor:
        """Return the best train of each line (L, T) that spends exactly so many steps (L,)."""
        held, found = self.so_far[:, -1].clone(), []
        for step in reversed(range(len(self.fired))):
            if self.steps:
                spent = spent - (self.so_far[:, step] - held).abs()
            fired = self.fired[step][self.line, held, spent]
            found.append(fired)
            held = held - fired.long()
        return torch.stack(found[::-1], dim=1)
