"""Speculation: a draft proposes tokens, and the model verifies them all in one pass. None of its tokens changes.

Leviathan et al. 2023 (arXiv:2211.17192), Chen et al. 2023 (arXiv:2302.01318). Here a token is a function of logits,
seed and position (see engine.sampling), so that a draft is right exactly when it is the model's own choice, sampled or
not; and the draft, which chooses with the same noise and filters, is right often. How many tokens are drafted follows
from what they cost and how often they were right, both as measured: time may decide that, and never a token.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from pronghorn.ops import PAGE, Batch, Choice

if TYPE_CHECKING:
    from pronghorn.engine.pages import PagePool
    from pronghorn.engine.scheduler import Request
    from pronghorn.ops import Runner

LONGEST = 15
"""Tokens drafted at most: with the one before them, 16 rows."""

TRIAL = 2
"""Tokens drafted where it does not seem to pay, to see whether it still does not."""

WAITS = 16, 512
"""Steps from trial to trial: at first, and in the end, if none paid."""

GAIN = 1.02
"""What drafting must promise: below that the estimates are no better than their noise."""


class Odds:
    """How often drafts were right, by how sure they seemed (a class, from 0), each after drafts that were right.

    What lies back fades. A request begins with what is known of others, and soon goes by its own.
    """

    def __init__(self, rates: Sequence[float], weight: float = 4, fade: float = 0.97) -> None:
        self.right = [weight * rate for rate in rates]
        self.tried = [weight] * len(rates)
        self.fade = fade
        self.usual = rates[0]  # of a draft that is still to come

    def rate(self, kind: int) -> float:
        """The share of right ones."""
        return self.right[kind] / self.tried[kind]

    def note(self, kind: int, right: bool) -> None:
        """Learns from one draft."""
        self.right[kind] = self.right[kind] * self.fade + right
        self.tried[kind] = self.tried[kind] * self.fade + 1
        self.usual += (right - self.usual) / 16

    def child(self) -> Odds:
        """A beginning for one request."""
        child = Odds([self.rate(kind) for kind in range(len(self.tried))])
        child.usual = self.usual
        return child


class Costs:
    """Seconds that a pass over so many rows takes, as measured; of others, as the nearest say.

    `guess(rows)` stands in while nothing is known. What is slower than before counts less than what is faster: most
    of it is other processes' doing.
    """

    SLOPE = 0.03  # of a row more, where nothing is known: to be found out

    def __init__(self) -> None:
        self.known: dict[int, float] = {}

    def note(self, rows: int, seconds: float) -> None:
        """Learns from one pass."""
        rows = self._bucket(rows)
        before = self.known.get(rows)
        if before is None:
            self.known[rows] = seconds
            return
        now = before + (seconds - before) * (0.5 if seconds < before else 0.1)
        drift = (now / before) ** 0.5  # longer contexts and a slower machine are everyone's
        for other in self.known:
            self.known[other] *= drift
        self.known[rows] = now

    def of(self, rows: int) -> float:
        """The estimate; 0 while nothing is known."""
        rows = self._bucket(rows)
        if rows in self.known or not self.known:
            return self.known.get(rows, 0.0)
        below = max((n for n in self.known if n < rows), default=0)
        above = min((n for n in self.known if n > rows), default=0)
        if below and above:
            share = (rows - below) / (above - below)
            return self.known[below] * (1 - share) + self.known[above] * share
        near = below or above
        return self.known[near] * (1 + self.SLOPE * rows) / (1 + self.SLOPE * near)

    @staticmethod
    def _bucket(rows: int) -> int:
        return rows if rows <= 16 else -(-rows // 8) * 8


class Proposal:
    """Tokens drafted for a request, and the class of each (see Odds)."""

    __slots__ = ("kinds", "request", "token_ids", "worth")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.token_ids = array("i")
        self.kinds: list[int] = []
        self.worth = 1.0  # the probability that all are right

    def add(self, token_id: int, kind: int, worth: float) -> None:
        """One more token."""
        self.token_ids.append(token_id)
        self.kinds.append(kind)
        self.worth = worth


class Draft(Protocol):
    """Where proposals come from."""

    RATES: tuple[float, ...]  # how often each class is right, before anything is known

    def propose(self, requests: Sequence[Request], plan: Plan) -> list[Proposal]:
        """Proposals for some of these requests, as long as the plan says."""

    def verified(self, proposal: Proposal, n_right: int) -> None:
        """Learns how many of a proposal's tokens the request has now."""


class Plan:
    """One step's: which requests may have how many tokens drafted, and whether one more is worth its time."""

    def __init__(self, speculator: Speculator, n_decoding: int, forced: int | None) -> None:
        self.costs = speculator.costs
        self.pages = speculator.pages
        self.n_decoding = n_decoding
        self.room = speculator.max_tokens - n_decoding
        self.forced = forced  # tokens to draft for each, whatever they cost

    def may_grow(self, proposal: Proposal, context: int) -> bool:
        """Whether a request can have another token drafted: sees to its pages, which others need more urgently."""
        request = proposal.request
        length = len(request.token_ids) + len(proposal.token_ids) + 1  # and one that follows from them
        if len(proposal.token_ids) >= LONGEST or length >= min(request.limit, context + 2):
            return False
        if length > len(request.pages) * PAGE:
            taken = self.pages.take(1) if self.pages.n_free > self.n_decoding else None
            if taken is None:
                return False
            request.pages += taken
        return True

    def rate(self, tokens: float, rows: int, seconds: float = 0.0) -> float:
        """Tokens a second of a step that drafts for so many seconds, and verifies so many rows."""
        return (self.n_decoding + tokens) / (seconds + self.costs.of(self.n_decoding + rows))


class Speculator:
    """An engine's drafts: proposes them before a step, and learns from it.

    `lengths` fixes how many tokens are drafted; None finds out what pays.
    """

    def __init__(self, draft: Draft, pages: PagePool, *, max_tokens: int, lengths: int | None = None) -> None:
        self.draft = draft
        self.pages = pages
        self.max_tokens = max_tokens
        self.lengths = lengths
        self.costs = Costs()  # of the model's own pass
        self.odds = Odds(draft.RATES, weight=16, fade=0.995)  # of all requests
        self.n_drafted = self.n_accepted = 0
        self.wait = WAITS[0]
        self.idle = 0  # steps without drafts

    def propose(self, work: Sequence[tuple[Request, int]]) -> dict[Request, Proposal]:
        """What to verify in this step. Beside prompts, which fill it, nothing is drafted."""
        if any(request.n_left > 1 for request, _ in work) or len(work) >= self.max_tokens:
            return {}
        trial = self.idle >= self.wait
        forced = TRIAL if trial else None
        if self.lengths is not None:
            forced = self.lengths
        elif not self.costs.known:  # the first step shows what there is to gain
            return {}
        for request, _ in work:
            request.odds = request.odds or self.odds.child()
        plan = Plan(self, len(work), forced)
        found = {p.request: p for p in self.draft.propose([request for request, _ in work], plan) if p.token_ids}
        if found:
            self.wait = min(2 * self.wait, WAITS[1]) if trial else WAITS[0]
        self.idle = 0 if found else self.idle + 1
        return found

    def ran(self, rows: int, seconds: float) -> None:
        """Learns what a pass over decoding rows took."""
        self.costs.note(rows, seconds)

    def verified(self, proposal: Proposal, n_right: int) -> None:
        """Learns how many of the drafts were right; the request has its new tokens."""
        request, odds = proposal.request, proposal.request.odds
        assert odds is not None
        request.n_drafted += len(proposal.token_ids)
        request.n_accepted += n_right
        self.n_drafted += len(proposal.token_ids)
        self.n_accepted += n_right
        for i, kind in enumerate(proposal.kinds[: n_right + 1]):  # what follows a wrong one shows nothing
            if i < n_right or not request.finish_reason:
                odds.note(kind, i < n_right)
                self.odds.note(kind, i < n_right)
        self.draft.verified(proposal, n_right)


class NgramDraft:
    """Prompt lookup (Saxena 2023): what followed the last tokens when they stood in prompt or output before.

    A class is the length of the repetition, which grows with each token that is right.
    """

    SHORTEST = 2
    LENGTHS = (16, 8, 4)  # that are looked for, before the shortest
    RATES: tuple[float, ...] = (0.3, 0.45, 0.55, 0.6, 0.65, 0.65, 0.7, 0.7, 0.75, 0.75, 0.75, 0.8, 0.8, 0.8, 0.8)

    def propose(self, requests: Sequence[Request], plan: Plan) -> list[Proposal]:
        """See Draft. Proposals cost nothing; rows do, so the likeliest ones are kept as long as they pay."""
        choices: list[tuple[float, int, int, int]] = []  # probability, request, token id, class
        for number, request in enumerate(requests):
            match, following = self.lookup(request.token_ids)
            worth = 1.0
            assert request.odds is not None
            for i, token_id in enumerate(following):
                kind = min(match + i - self.SHORTEST, len(self.RATES) - 1)
                worth *= request.odds.rate(kind)
                choices.append((worth, number, token_id, kind))
                if token_id in request.stop_ids:
                    break
        choices.sort(key=lambda choice: -choice[0])  # stable: a request's own stay in order
        del choices[min(plan.room, 8 * LONGEST) :]
        if plan.forced is None:
            n_best, best, tokens = 0, plan.rate(0, 0) * GAIN, 0.0
            for n, choice in enumerate(choices, 1):
                tokens += choice[0]
                if (rate := plan.rate(tokens, n)) > best:
                    n_best, best = n, rate
            del choices[n_best:]
        proposals = [Proposal(request) for request in requests]
        for worth, number, token_id, kind in choices:
            proposal = proposals[number]
            if len(proposal.token_ids) != plan.forced and plan.may_grow(proposal, proposal.request.limit):
                proposal.add(token_id, kind, worth)
        return proposals

    def verified(self, proposal: Proposal, n_right: int) -> None:
        """See Draft."""

    def lookup(self, token_ids: array[int]) -> tuple[int, array[int]]:
        """The longest repetition that the tokens end with (of equals the latest), and what followed it there."""
        n = len(token_ids)
        if n <= self.SHORTEST:
            return 0, array("i")
        data = token_ids.tobytes()
        start = before(data, self.SHORTEST)
        if start < 0:
            return 0, array("i")
        for length in self.LENGTHS:
            if length < n and (longer := before(data, length)) >= 0:
                start = longer + length - self.SHORTEST
                break
        end = start + self.SHORTEST
        match = self.SHORTEST
        while match < end and match < len(self.RATES) + 1 and token_ids[end - match - 1] == token_ids[n - match - 1]:
            match += 1
        return match, token_ids[end : end + LONGEST]


def before(data: bytes, n_tokens: int) -> int:
    """Where the last so many tokens of 4 bytes stood before, at the latest; -1: nowhere."""
    pattern = data[-4 * n_tokens :]
    at = data.rfind(pattern, 0, len(data) - 4)
    while at % 4 and at > 0:
        at = data.rfind(pattern, 0, at + len(pattern) - 1)
    return -1 if at % 4 else at // 4


class ModelDraft:
    """A smaller model, or the model's own quantized copy, which runs ahead token by token, all requests side by side.

    `runner` uses the engine's page tables. With `shared` it reads and writes the model's own keys and values: what it
    leaves beyond the tokens that are computed, verification writes over before it is read. Without, it has a cache of
    its own with as many pages, and follows the requests there. `cost` is its pass against the model's, at first.
    """

    RATES: tuple[float, ...] = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.35)
    EDGES = (-0.03, -0.1, -0.22, -0.43, -0.7, -1.05, -1.6)  # between classes: logarithms of the token's probability

    def __init__(
        self,
        runner: Runner,
        pages: PagePool,
        *,
        shared: bool,
        context: int,
        max_tokens: int,
        cost: float = 0.25,
    ) -> None:
        self.runner = runner
        self.pages = pages
        self.shared = shared
        self.context = context
        self.max_tokens = max_tokens
        self.cost = cost
        self.costs = Costs()
        self.held: dict[int, tuple[int, bytes] | None] = {}  # what the draft's own pages hold, where that is known

    def propose(self, requests: Sequence[Request], plan: Plan) -> list[Proposal]:
        """See Draft."""
        proposals = [Proposal(request) for request in requests]
        active, seconds = proposals, 0.0
        while active := self.worth_another(active, proposals, plan, seconds):
            started = time.perf_counter()
            n_rows, drafted = self.extend(active)
            if n_rows:
                self.costs.note(n_rows, time.perf_counter() - started)
            seconds += self.pass_of(len(active), plan)  # to catch up is not this step's expense
            active = drafted
        return proposals

    def worth_another(
        self, active: list[Proposal], proposals: list[Proposal], plan: Plan, seconds: float
    ) -> list[Proposal]:
        """Who of the active gets another draft, of which `seconds` have gone into those before.

        One more may pay only together with its successors, so these are looked at too.
        """
        length = max((len(p.token_ids) for p in proposals), default=0)
        rows = sum(len(p.token_ids) for p in proposals)
        active = [p for p in active if plan.may_grow(p, self.context)]
        if plan.forced is not None:
            return active if length < plan.forced and rows + len(active) <= plan.room else []
        tokens = sum(expected(p, proposal_odds(p)) for p in proposals)
        best, n_best = plan.rate(tokens, rows, seconds) * GAIN, 0
        active.sort(key=lambda p: -p.worth)
        n = len(active)
        while n:
            worth = [p.worth for p in active[:n]]
            usual = [proposal_odds(p).usual for p in active[:n]]
            more, took = tokens, seconds
            for ahead in range(1, LONGEST - length + 1):
                if rows + ahead * n > plan.room:
                    break
                worth = [w * u for w, u in zip(worth, usual, strict=True)]
                more += sum(worth)
                took += self.pass_of(n, plan)
                rate = plan.rate(more, rows + ahead * n, took)
                if rate <= best and ahead > 4:
                    break
                if rate > best:
                    best, n_best = rate, n
            n //= 2
        return active[:n_best]

    def pass_of(self, rows: int, plan: Plan) -> float:
        """Seconds that a pass takes."""
        return self.costs.of(rows) or self.cost * plan.costs.of(rows)

    def extend(self, active: list[Proposal]) -> tuple[int, list[Proposal]]:
        """One pass -> its rows, and the proposals that have one more token, and may have another."""
        batch = Batch(table_width=max(len(p.request.pages) for p in active), logits_here=False)
        budget = self.max_tokens
        spans, reached = [], []
        for row, proposal in enumerate(active):
            request = proposal.request
            ids = request.token_ids + proposal.token_ids
            start = self.start(proposal)
            end = min(len(ids), start + budget)
            budget -= end - start
            batch.token_ids.extend(ids[start:end])
            batch.positions.extend(range(start, end))
            batch.sequence.extend([row] * (end - start))
            batch.page_table.extend(request.pages)
            batch.page_table.extend([0] * (batch.table_width - len(request.pages)))
            spans.append((request, start, end))
            if start < end == len(ids):
                batch.logits_rows.append(len(batch.token_ids) - 1)
                reached.append((proposal, ids))
        if not batch.token_ids:
            return 0, []
        logits = self.runner.run(batch)
        for span in spans:
            self.wrote(*span)
        choices = [
            Choice(proposal.request.sampler, row, ids, proposal.request.n_prompt, None, 0)
            for row, (proposal, ids) in enumerate(reached)
        ]
        drafted = []
        for (proposal, _), chosen in zip(reached, self.runner.choose(logits, choices), strict=True):
            if isinstance(chosen, str):  # the draft has no finite logits: then there is none
                continue
            request, odds = proposal.request, proposal_odds(proposal)
            token_id, ((_, sure),) = chosen
            kind = sum(sure < edge for edge in self.EDGES)
            proposal.add(token_id, kind, proposal.worth * odds.rate(kind))
            if token_id not in request.stop_ids:
                drafted.append(proposal)
        return len(batch.token_ids), drafted

    def start(self, proposal: Proposal) -> int:
        """The first token that the draft has not computed."""
        request = proposal.request
        if self.shared or proposal.token_ids:
            return request.n_computed + len(proposal.token_ids)
        # Pages of the prefix cache that another request's draft has filled.
        page, there = divmod(request.n_in_draft, PAGE)
        while not there and (page + 1) * PAGE <= request.n_computed:
            contents = self.pages.contents(request.pages[page])
            if contents is None or self.held.get(request.pages[page]) != contents:
                break
            page += 1
            request.n_in_draft = page * PAGE
        return request.n_in_draft

    def wrote(self, request: Request, start: int, end: int) -> None:
        """Notes what the draft's own cache has now."""
        if self.shared:
            return
        request.n_in_draft = min(end, len(request.token_ids))
        for page in range(start // PAGE, -(-end // PAGE)):
            number = request.pages[page]
            whole = (page + 1) * PAGE <= min(end, request.n_computed)
            self.held[number] = self.pages.contents(number) if whole else None

    def verified(self, proposal: Proposal, n_right: int) -> None:
        """See Draft. The last draft was not read by the draft model; what follows a wrong one is forgotten."""
        if proposal.request.pages:
            proposal.request.n_in_draft += min(n_right, len(proposal.token_ids) - 1)


def proposal_odds(proposal: Proposal) -> Odds:
    """Its request's odds, which Speculator.propose has seen to."""
    assert proposal.request.odds is not None
    return proposal.request.odds


def expected(proposal: Proposal, odds: Odds) -> float:
    """Drafts that will be right, of those proposed."""
    total, worth = 0.0, 1.0
    for kind in proposal.kinds:
        worth *= odds.rate(kind)
        total += worth
    return total
