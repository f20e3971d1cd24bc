"""The draft as a tree of tokens, and the acceptance of its longest path that the target agrees with.

Node 0 is the root: the pending token, which is committed but whose keys and values no full-depth step has computed yet.
Every other node is a drafted token. Nodes come in topological order (a parent before its children), so node i is
row i of the verification. A chain is a tree whose nodes have one child each; plain decoding is a tree of only its root.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_NODES = 16  # rows of one tile: the root and at most 15 drafted tokens
NO_ANCESTOR = -1
FROM_TEXT = -1  # stands for an exit layer where a token was copied from the text: no layer was asked


class DraftTree:
    """Tokens and parents of one sequence's draft, grown node by node.

    Per node, in lists of the same length: `tokens`, `parents` (-1 for the root), `depths` (0 for the root),
    `exit_layers` (layers executed when the node was drafted, `FROM_TEXT` if none was asked; None for the root) and
    `entropies` (nats, of the distribution it was drafted from; None for the root and for drafts from the text). Read
    them freely, grow them only through `add`.
    """

    def __init__(self, root_token: int, max_nodes: int = MAX_NODES) -> None:
        if not 1 <= max_nodes <= MAX_NODES:
            raise ValueError(f"max_nodes is {max_nodes}, expected 1 to {MAX_NODES} (the root included)")
        self.max_nodes = max_nodes
        self.tokens: list[int] = [_token(root_token)]
        self.parents: list[int] = [NO_ANCESTOR]
        self.depths: list[int] = [0]
        self.exit_layers: list[int | None] = [None]
        self.entropies: list[float | None] = [None]
        self._children: list[dict[int, int]] = [{}]  # of each node: token -> child

    @classmethod
    def from_lists(cls, tokens: Sequence[int], parents: Sequence[int]) -> DraftTree:
        """A tree from node tokens and parents; `parents[0]` must be -1.

        Raises:
            ValueError: lengths differ, no root, or anything that `add` refuses.
        """
        if len(tokens) != len(parents) or not tokens or parents[0] != NO_ANCESTOR:
            raise ValueError(
                f"{len(tokens)} tokens and {len(parents)} parents given (first parent "
                f"{parents[0] if parents else None}), expected as many of each and {NO_ANCESTOR} as the first parent"
            )
        tree = cls(tokens[0])
        for token, parent in zip(tokens[1:], parents[1:], strict=True):
            tree.add(parent, token)
        return tree

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"DraftTree(tokens={self.tokens}, parents={self.parents})"

    @property
    def num_drafted(self) -> int:
        """Nodes without the root."""
        return len(self.tokens) - 1

    @property
    def is_full(self) -> bool:
        return len(self.tokens) >= self.max_nodes

    @property
    def is_chain(self) -> bool:
        """Whether no node has more than one child (true of a tree that is only its root)."""
        return all(len(children) <= 1 for children in self._children)

    @property
    def max_depth(self) -> int:
        return max(self.depths)

    def add(self, parent: int, token: int, exit_layer: int | None = None, entropy: float | None = None) -> int:
        """Hang a drafted token below `parent`.

        Returns:
            The new node's index.

        Raises:
            ValueError: the tree is full, the parent does not exist, or it already has a child with this token
                (two equal siblings would claim the same path twice).
        """
        if self.is_full:
            raise ValueError(f"the tree holds {len(self)} nodes, its maximum; verify it before drafting more")
        if not 0 <= parent < len(self):
            raise ValueError(f"parent is {parent}, expected an existing node in 0..{len(self) - 1}")
        token = _token(token)
        if token in self._children[parent]:
            raise ValueError(f"node {parent} already has child {self._children[parent][token]} with token {token}")
        node = len(self)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.exit_layers.append(exit_layer)
        self.entropies.append(entropy)
        self._children.append({})
        self._children[parent][token] = node
        return node

    def children(self, node: int) -> list[int]:
        """Children of a node, in the order they were added."""
        return list(self._children[node].values())

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` with this token, if there is one."""
        return self._children[node].get(token)

    def leaves(self) -> list[int]:
        """Nodes without children, ascending; the root alone is a leaf."""
        return [node for node, children in enumerate(self._children) if not children]

    def path(self, node: int) -> list[int]:
        """Node indices from the root to `node`, both included."""
        nodes = []
        while node != NO_ANCESTOR:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def path_tokens(self, node: int) -> list[int]:
        """Drafted tokens from the root's child to `node`: what this node adds to the committed prefix."""
        return [self.tokens[ancestor] for ancestor in self.path(node)[1:]]

    def positions(self, root_position: int) -> list[int]:
        """Absolute position of every node's token, given the root's; siblings share one."""
        return [root_position + depth for depth in self.depths]

    def ancestor_table(self, num_rows: int | None = None) -> Tensor:
        """Who stands on each row's path.

        Args:
            num_rows: rows of the table, at least `len(self)`; the rows beyond the tree see only the root.

        Returns:
            [num_rows, num_rows] int64 on the CPU: entry (i, d) is the node at depth d on the path from the root to node
            i (node i itself at its own depth), NO_ANCESTOR beyond it.

        Raises:
            ValueError: num_rows is smaller than the tree.
        """
        num_rows = len(self) if num_rows is None else num_rows
        if num_rows < len(self):
            raise ValueError(f"num_rows is {num_rows}, expected at least the tree's {len(self)} nodes")
        table = [[NO_ANCESTOR] * num_rows for _ in range(num_rows)]
        for row, entries in enumerate(table):
            path = self.path(row) if row < len(self) else [0]
            entries[: len(path)] = path
        return torch.tensor(table, dtype=torch.int64)

    def visibility(self, num_rows: int | None = None) -> Tensor:
        """[num_rows, num_rows] bool: whether row i sees node j's key, that is j stands on i's path (i included)."""
        table = self.ancestor_table(num_rows)
        return (table.unsqueeze(-1) == torch.arange(table.shape[0])).any(dim=1)


@dataclass(frozen=True)
class Acceptance:
    """The verdict on one tree: accepted `nodes` below the root in path order, their `tokens`, and the `bonus` token.

    `last` is the node whose target is the bonus: the last accepted one, or the root. The committed block is
    `committed`. A bonus that is not a token (a sampler's marker for a row that gave none) is passed on as it came.
    """

    nodes: tuple[int, ...]
    tokens: tuple[int, ...]
    bonus: int

    @property
    def last(self) -> int:
        return self.nodes[-1] if self.nodes else 0

    @property
    def committed(self) -> tuple[int, ...]:
        return (*self.tokens, self.bonus)


def accept(tree: DraftTree, targets: Sequence[int] | Callable[[int], int]) -> Acceptance:
    """Walk from the root along the children that equal the target's own token.

    Exactly the tokens that plain decoding would emit: each accepted node's row has seen only accepted tokens, and its
    target is the next one.

    Args:
        tree: the verified draft.
        targets: of each node the token that the target emits after it, as a sequence over nodes or as a function
            of the node. A function is called only for the root and the accepted nodes, in path order: targets of
            rejected nodes are never needed, and a caller's logits processor then sees only prefixes that plain decoding
            would show it.

    Raises:
        ValueError: a sequence of another length than the tree.
    """
    if callable(targets):
        target_of = targets
    elif len(targets) != len(tree):
        raise ValueError(f"{len(targets)} targets given for a tree of {len(tree)} nodes, expected one a node")
    else:
        target_of = targets.__getitem__
    nodes: list[int] = []
    target = target_of(0)
    child = tree.child(0, target)
    while child is not None:
        nodes.append(child)
        target = target_of(child)
        child = tree.child(child, target)
    return Acceptance(tuple(nodes), tuple(tree.tokens[node] for node in nodes), target)


def _token(token: int) -> int:
    if token < 0:
        raise ValueError(f"token is {token}, expected a token id of at least 0")
    return int(token)
