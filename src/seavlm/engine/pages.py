"""Which pages of the KV cache hold what: block tables, the sliding window, and the prefix cache.

A page holds BLOCK positions of every layer of one kind: global layers (which see everything) and local ones
(the last window) have pages and tables of their own. A local page is given up as soon as the window has
passed it, so a sequence of T tokens holds ceil(T / BLOCK) global pages and at most ceil((W - 1) / BLOCK) + 1
local ones between steps.

What a page holds is named by what was read: a tree of blocks, each the child of the one before it. When a
sequence ends, its pages stay, least recently used first to go, and a prompt that begins alike takes them
over: whole blocks are shared, the last one is copied where it ends in the middle. A hit never ends inside a
picture, and needs the local pages of the window before its end.

Nothing here touches keys and values: a runner does (`seavlm.engine.runner`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from seavlm.engine.sequence import Sequence
from seavlm.model.config import GLOBAL, LOCAL

BLOCK = 64
KINDS = (GLOBAL, LOCAL)
CopyPage = Callable[[str, int, int], None]  # kind, from, to


@dataclass(eq=False)
class Block:
    """Up to BLOCK positions of some text. `items` says what stands there (`sequence.prefix_items`)."""

    parent: Block | None
    items: list[int] = field(default_factory=list)
    children: dict[int, list[Block]] = field(default_factory=dict)  # by their first item
    page: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(KINDS))
    users: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    findable: bool = False  # from its parent, and so from the root


@dataclass
class Held:
    """The blocks of a sequence and where their pages are."""

    blocks: list[Block] = field(default_factory=list)
    passed: int = 0  # leading blocks whose local page was given up
    tables: dict[str, np.ndarray] = field(  # int32 [at least len(blocks)]: the page of each block
        default_factory=lambda: {kind: np.zeros(16, np.int32) for kind in KINDS}
    )

    def append(self, block: Block) -> None:
        number = len(self.blocks)
        self.blocks.append(block)
        for kind, table in self.tables.items():
            if number == len(table):
                self.tables[kind] = table = np.concatenate((table, np.zeros_like(table)))
            table[number] = block.page[kind] or 0


class Pages:
    """The pages of both kinds: handed out, shared, remembered, taken back.

    num: how many pages of each kind there are. window: the local layers' W. copy_page: copies what is in a
    page. remember: let what was read be found by others.
    """

    def __init__(
        self, num: dict[str, int], window: int, copy_page: CopyPage, *, remember: bool = True
    ) -> None:
        self.num, self.window, self._copy_page, self.remember = num, window, copy_page, remember
        self.free = {kind: list(range(count))[::-1] for kind, count in num.items()}
        self.idle: dict[str, OrderedDict[Block, None]] = {kind: OrderedDict() for kind in KINDS}
        self.root = Block(None)

    def in_use(self, kind: str) -> int:
        """Pages that sequences hold."""
        return self.num[kind] - len(self.free[kind]) - len(self.idle[kind])

    # --- taking

    def reserve(self, sequence: Sequence, end: int) -> bool:
        """Give the sequence pages for its positions before `end`; False, and nothing given, if there are
        none."""
        held = sequence.held
        assert held is not None
        missing = -(-end // BLOCK) - len(held.blocks)
        if any(missing > len(self.free[kind]) + len(self.idle[kind]) for kind in KINDS):
            return False
        for _ in range(missing):
            block = Block(held.blocks[-1] if held.blocks else self.root)
            for kind in KINDS:
                block.page[kind], block.users[kind] = self._take(kind), 1
            held.append(block)
        return True

    def _take(self, kind: str) -> int:
        """A page that nobody uses; the one that was not used for the longest time if all hold something."""
        if not self.free[kind]:
            block = next(iter(self.idle[kind]))
            if kind == GLOBAL:
                self._forget(block)
            else:
                del self.idle[LOCAL][block]
                self._give_back(block, LOCAL)
        return self.free[kind].pop()

    def _forget(self, block: Block) -> None:
        """Give up a block that nobody uses, and what comes after it: it cannot be found any more."""
        if block.parent is not None and block.findable:
            siblings = block.parent.children[block.items[0]]
            siblings.remove(block)
            if not siblings:
                del block.parent.children[block.items[0]]
        todo = [block]
        while todo:
            block = todo.pop()
            todo += [child for children in block.children.values() for child in children]
            block.children, block.findable = {}, False
            for kind in KINDS:
                if not block.users[kind]:
                    self.idle[kind].pop(block, None)
                    self._give_back(block, kind)

    def _give_back(self, block: Block, kind: str) -> None:
        page, block.page[kind] = block.page[kind], None
        if page is not None:
            self.free[kind].append(page)

    # --- finding what was read before

    def match(self, sequence: Sequence, limit: int | None = None) -> tuple[int, list[Block]]:
        """The longest hit: how many of the sequence's first tokens are here, and their blocks."""
        items, limit = sequence.items, sequence.known_limit if limit is None else limit
        found, at = list[Block](), 0
        block = self.root
        while at < limit:
            best, most = None, 0
            wanted = items[at : min(at + BLOCK, limit)]
            for child in block.children.get(wanted[0], ()):
                if len(child.items) <= most or child.items[most] != wanted[most]:
                    continue  # it cannot have more in common
                if child.page[GLOBAL] is not None and (same := _common(child.items, wanted)) > most:
                    best, most = child, same
                    if same == len(wanted):
                        break
            if best is None:
                break
            found.append(best)
            at += most
            block = best
            if most < BLOCK:
                break
        while at > 0:
            if span := sequence.cuts_picture(at):
                at = span[0]
                continue
            first = max(0, at - self.window + 1) // BLOCK
            gone = [j for j in range(first, -(-at // BLOCK)) if found[j].page[LOCAL] is None]
            if not gone:
                break
            at = gone[-1] * BLOCK
        return at, found[: -(-at // BLOCK)]

    def admit(self, sequence: Sequence) -> None:
        """Begin to hold pages: those of the longest hit. Its end is copied where it lies in the middle of a
        block and there is a page for that; else the hit ends with the block before."""
        length, found = self.match(sequence)
        if length % BLOCK and not self._take_over(sequence, length, found):
            length, found = self.match(sequence, length - length % BLOCK)
            if length % BLOCK:  # before a picture, in the middle of a block
                length, found = 0, []
        if not length % BLOCK:
            self._take_over(sequence, length, found)
        sequence.computed = length
        if not sequence.ids:
            sequence.cached = length

    def _take_over(self, sequence: Sequence, length: int, found: list[Block]) -> bool:
        held = sequence.held = Held()
        held.passed = max(0, length - self.window + 1) // BLOCK
        for number, block in enumerate(found[: length // BLOCK]):
            self._use(block, GLOBAL)
            if number >= held.passed:
                self._use(block, LOCAL)
            held.append(block)
        if length % BLOCK == 0:
            return True
        source = found[-1]
        for kind in KINDS:  # not to be given up while it is copied
            self._use(source, kind)
        fine = self.reserve(sequence, length)
        if fine:
            copy = held.blocks[-1]
            for kind in KINDS:
                page, target = source.page[kind], copy.page[kind]
                assert page is not None and target is not None
                self._copy_page(kind, page, target)
            self._add(copy, source.items[: length % BLOCK])
        for kind in KINDS:
            self._unuse(source, kind)
        if not fine:
            self.release(sequence)
        return fine

    # --- what was read

    def commit(self, sequence: Sequence, end: int) -> None:
        """The sequence's positions before `end` are in its pages now. Local pages that no later token sees
        go."""
        held = sequence.held
        assert held is not None
        at = sequence.computed
        while at < end:
            block = held.blocks[at // BLOCK]
            upto = min(end, (at // BLOCK + 1) * BLOCK)
            self._add(block, sequence.items[at:upto])
            at = upto
        sequence.computed = end
        while (held.passed + 1) * BLOCK <= end - self.window + 1:
            self._unuse(held.blocks[held.passed], LOCAL)
            held.passed += 1

    def _add(self, block: Block, items: list[int]) -> None:
        new = not block.items
        block.items += items
        if new and self.remember and block.parent is not None:
            block.findable = True
            block.parent.children.setdefault(block.items[0], []).append(block)

    # --- giving back

    def release(self, sequence: Sequence) -> None:
        """The sequence ends, or waits again: its pages are nobody's, and stay as long as there are others."""
        held, sequence.held, sequence.computed = sequence.held, None, 0
        if held is None:
            return
        for number in range(len(held.blocks) - 1, -1, -1):  # the end is forgotten before the beginning
            block = held.blocks[number]
            self._unuse(block, GLOBAL)
            if number >= held.passed:
                self._unuse(block, LOCAL)

    def _use(self, block: Block, kind: str) -> None:
        block.users[kind] += 1
        self.idle[kind].pop(block, None)

    def _unuse(self, block: Block, kind: str) -> None:
        block.users[kind] -= 1
        if block.users[kind]:
            return
        if block.findable:
            self.idle[kind][block] = None
        else:  # reserved and never written, or found by nobody
            self._give_back(block, kind)


def _common(a: list[int], b: list[int]) -> int:
    """How many of the first items are equal."""
    if a[: len(b)] == b:
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
