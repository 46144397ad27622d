from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from passes import (
    Block,
    EliminateNoops,
    FuseConvBnRelu,
    InsertQuantDequant,
    QuantizerSite,
    UnsupportedGraphError,
    format_tree,
    partition_blocks,
)
from passes.blocks.flow import is_layer, is_quantizer
from passes.infra import verify
from tests.passes.checking import float_graph
from tests.passes.models import annotated, batch_norm, image, make


class Quantizer(nn.Module):
    """Stands for a quantizer: passes know one by its operation."""

    operation = "quantize"

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.0


class Residual(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.down = nn.Conv2d(channels_in, channels, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        return F.relu(torch.add(y, x if self.down is None else self.down(x)))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.layer1 = nn.Sequential(Residual(4, 4), Residual(4, 4))
        self.layer2 = nn.Sequential(Residual(4, 8, 2), Residual(8, 8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), kernel_size=2)
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, output_size=1), start_dim=1))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.matmul(self.query(x), torch.transpose(self.key(x), 1, 2))
        return self.out(torch.matmul(F.softmax(scores, dim=-1), self.value(x)))


class Layer(nn.Module):
    def __init__(self, width: int, *, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_norm:
            x = torch.add(x, self.attention(self.norm1(x)))
            return torch.add(x, self.mlp(self.norm2(x)))
        x = self.norm1(torch.add(x, self.attention(x)))
        return self.norm2(torch.add(x, self.mlp(x)))


class Transformer(nn.Module):
    def __init__(self, *, pre_norm: bool = True, width: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(torch.zeros(1, 4, width))
        self.layers = nn.Sequential(*(Layer(width, pre_norm=pre_norm) for _ in range(2)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.transpose(torch.flatten(self.patches(x), start_dim=2), 1, 2)
        x = self.layers(torch.add(x, self.position))
        x = self.norm(x) if self.layers[0].pre_norm else x
        return self.head(torch.mean(x, dim=1))


def inverted(channels: int, out: int, *, squeeze: bool = False) -> nn.Module:
    """An inverted residual, with the addition where the channels agree."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu6(self.depthwise(F.relu6(self.expand(x))))
        if squeeze:
            gate = F.adaptive_avg_pool2d(y, output_size=1)
            y = torch.mul(y, torch.sigmoid(self.restore(F.relu(self.reduce(gate)))))
        y = self.project(y)
        return torch.add(x, y) if channels == out else y

    members: dict[str, nn.Module] = {
        "expand": nn.Conv2d(channels, 8, 1),
        "depthwise": nn.Conv2d(8, 8, 3, 1, 1, groups=8),
        "project": nn.Conv2d(8, out, 1),
    }
    if squeeze:
        members |= {"reduce": nn.Conv2d(8, 2, 1), "restore": nn.Conv2d(2, 8, 1)}
    return make(forward, **members)


def chain(*parts: nn.Module) -> nn.Module:
    model = nn.Module()
    for index, part in enumerate(parts):
        model.add_module(f"b{index}", part)

    def forward(self: Any, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x

    return make(forward, **dict(model.named_children()))


def fused(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    graph_module = annotated(model.eval(), *(inputs or (image(),)))
    EliminateNoops().run(graph_module)
    FuseConvBnRelu().run(graph_module)
    verify.run_and_annotate(graph_module, inputs or (image(),), name="fused")
    return graph_module


def simulated(graph_module: fx.GraphModule, raw: Sequence[str] = ()) -> fx.GraphModule:
    """Quantizers behind every tensor; the nodes `raw` read their operands as they are."""
    nodes = [n for n in graph_module.graph.nodes if n.op != "output" and n.op != "get_attr"]
    sites = [QuantizerSite(f"quantizers.{n.name}", Quantizer(), [n.name]) for n in nodes]
    reads: Callable[[fx.Node, fx.Node], bool] = lambda value, user: user.name not in raw  # noqa: E731
    InsertQuantDequant(sites, {}, reads).run(graph_module)
    return graph_module


def names(blocks: Sequence[Block]) -> list[str]:
    return [block.name for block in blocks]


def rules(blocks: Sequence[Block]) -> list[str]:
    return [block.rule for block in blocks]


def check(graph_module: fx.GraphModule, blocks: Sequence[Block]) -> None:
    """What a partition promises."""
    nodes = {node.name: node for node in graph_module.graph.nodes}
    order = list(nodes)
    layers = [str(node.target) for node in nodes.values() if is_layer(node)]
    assert [path for block in blocks for path in block.layers] == layers
    owners: dict[str, str] = {}
    for block in blocks:
        inside = set(block.nodes)
        assert list(block.nodes) == sorted(block.nodes, key=order.index)
        computed = [name for name in block.nodes if nodes[name].op != "get_attr"]
        read_outside = [n for n in computed if any(u.name not in inside for u in nodes[n].users)]
        assert read_outside == [block.output]
        sources = {s.name for name in inside for s in nodes[name].all_input_nodes}
        assert sources - inside == set(block.inputs)
        for name in computed:
            assert owners.setdefault(name, block.name) == block.name
        if block.children:
            assert [path for child in block.children for path in child.layers] == list(block.layers)
    outputs = [order.index(block.output) for block in blocks]
    assert outputs == sorted(outputs)


def test_residual_blocks_stem_and_head() -> None:
    graph_module = fused(ResNet())
    blocks = partition_blocks(graph_module)
    check(graph_module, blocks)
    assert format_tree(blocks).splitlines()[:5] == [
        "stem              1 layer    layer      x -> max_pool2d",
        "layer1.0          2 layers   residual   max_pool2d -> layer1_0_conv2",
        "  layer1.0.conv1  1 layer    layer      max_pool2d -> layer1_0_conv1",
        "  layer1.0.conv2  1 layer    layer      max_pool2d, layer1_0_conv1 -> layer1_0_conv2",
        "layer1.1          2 layers   residual   layer1_0_conv2 -> layer1_1_conv2",
    ]
    assert names(blocks) == ["stem", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "fc"]
    assert blocks[3].layers == ("layer2.0.conv1", "layer2.0.conv2", "layer2.0.down")
    assert blocks[-1].inputs == (blocks[-2].output,)


def test_the_relu_behind_an_addition_belongs_to_the_block() -> None:
    (block,) = partition_blocks(annotated(Residual(3, 3).eval(), image()))
    assert block.nodes[-2:] == ("add", "relu_1")
    assert block.output == "relu_1"


def test_stages_are_blocks_of_one_resolution() -> None:
    graph_module = fused(ResNet())
    stages = partition_blocks(graph_module, "stage")
    check(graph_module, stages)
    assert names(stages) == ["stem..layer1", "layer2", "fc"]
    assert rules(stages) == ["resolution", "resolution", "layer"]
    assert names(stages[0].children) == ["stem", "layer1.0", "layer1.1"]
    assert names(stages[1].children[0].children) == [
        "layer2.0.conv1", "layer2.0.conv2", "layer2.0.down"
    ]  # fmt: skip


def test_the_model_is_one_block() -> None:
    graph_module = fused(ResNet())
    (model,) = partition_blocks(graph_module, "model")
    check(graph_module, [model])
    assert names(model.children) == ["stem..layer1", "layer2", "fc"]
    assert model.rule == "network"
    assert model.inputs == ("x",)
    assert model.output == "fc"


def test_each_layer_with_its_activation() -> None:
    graph_module = annotated(chain(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)), image())
    first, second = partition_blocks(graph_module, "layer")
    assert first.nodes == ("b0", "b1")
    assert (second.name, second.inputs, second.children) == ("b2", ("b1",), ())


def test_inverted_residuals_with_and_without_addition() -> None:
    model = chain(nn.Conv2d(3, 4, 3, 2, 1), inverted(4, 6), inverted(6, 6), nn.Conv2d(6, 9, 1))
    blocks = partition_blocks(fused(model))
    assert names(blocks) == ["b0", "b1", "b2", "b3"]
    assert rules(blocks) == ["layer", "module", "residual", "layer"]
    assert blocks[1].layers == ("b1.expand", "b1.depthwise", "b1.project")


@pytest.mark.parametrize("out", [4, 6])
def test_squeeze_and_excitation_stays_inside(out: int) -> None:
    stem = nn.Conv2d(3, 4, 1)
    graph_module = fused(chain(stem, inverted(4, out, squeeze=True), nn.Conv2d(out, 4, 1)))
    blocks = partition_blocks(graph_module)
    check(graph_module, blocks)
    assert names(blocks) == ["b0", "b1", "b2"]


def test_branches_that_are_concatenated() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        left = self.left(x)
        right = torch.cat((self.a(y := F.relu(self.right(x))), self.b(y)), dim=1)
        return F.relu(torch.cat((left, right, F.max_pool2d(x, 3, 1, 1)), dim=1))

    layers = {name: nn.Conv2d(4, 4, 1) for name in ("left", "right", "a", "b")}
    graph_module = fused(chain(nn.Conv2d(3, 4, 1), make(forward, **layers), nn.Conv2d(16, 4, 1)))
    blocks = partition_blocks(graph_module)
    check(graph_module, blocks)
    assert names(blocks) == ["b0", "b1", "b2"]
    assert rules(blocks) == ["layer", "branches", "layer"]


def test_a_channel_split_begins_the_block() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        a, b = torch.chunk(x, chunks=2, dim=1)[0], torch.chunk(x, chunks=2, dim=1)[1]
        return F.channel_shuffle(
            torch.cat((a, self.second(F.relu(self.first(b)))), dim=1), groups=2
        )

    def unit() -> nn.Module:
        return make(forward, first=nn.Conv2d(2, 2, 1), second=nn.Conv2d(2, 2, 1))

    graph_module = fused(chain(nn.Conv2d(3, 4, 1), unit(), unit()))
    blocks = partition_blocks(graph_module)
    check(graph_module, blocks)
    assert names(blocks) == ["b0", "b1", "b2"]
    assert blocks[1].output == "channel_shuffle"


def test_one_split_read_by_both_branches_begins_the_block() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        parts = torch.chunk(x, chunks=2, dim=1)
        return torch.cat((parts[0], self.conv(parts[1])), dim=1)

    unit = make(forward, conv=nn.Conv2d(2, 2, 1))
    graph_module = fused(chain(nn.Conv2d(3, 4, 1), unit, nn.Conv2d(4, 4, 1)))
    blocks = partition_blocks(graph_module)
    check(graph_module, blocks)
    assert [block.inputs for block in blocks] == [("x",), ("b0",), ("cat",)]


@pytest.mark.parametrize("pre_norm", [True, False])
def test_attention_and_mlp_are_blocks_and_a_layer_is_a_stage(pre_norm: bool) -> None:
    graph_module = annotated(Transformer(pre_norm=pre_norm).eval(), image())
    blocks = partition_blocks(graph_module)
    check(graph_module, blocks)
    assert names(blocks) == [
        "patches",
        "layers.0.attention", "layers.0.mlp",
        "layers.1.attention", "layers.1.mlp",
        "head",
    ]  # fmt: skip
    last = blocks[-2].output
    assert last == ("add_4" if pre_norm else "layers_1_norm2")
    assert blocks[-1].nodes == (*(["norm"] if pre_norm else []), "mean", "head")
    assert blocks[-1].inputs == (last,)
    stages = partition_blocks(graph_module, "stage")
    check(graph_module, stages)
    assert names(stages) == ["patches", "layers.0", "layers.1", "head"]


def test_layers_of_attention_take_its_products_along() -> None:
    graph_module = annotated(Attention(4).eval(), torch.randn(1, 3, 4))
    blocks = partition_blocks(graph_module, "layer")
    check(graph_module, blocks)
    assert names(blocks) == ["query", "key", "value", "out"]
    assert set(blocks[-1].inputs) == {"query", "key", "value"}


def test_a_skip_around_residual_blocks_leaves_them_apart() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(torch.add(y, self.conv(self.body(y))))

    body = nn.Sequential(Residual(4, 4), Residual(4, 4))
    layers = {"first": nn.Conv2d(3, 4, 1), "conv": nn.Conv2d(4, 4, 1), "last": nn.Conv2d(4, 3, 1)}
    graph_module = annotated(make(forward, body=body, **layers), image())
    blocks = partition_blocks(graph_module)
    check_layers = [path for block in blocks for path in block.layers]
    assert names(blocks) == ["first", "body.0", "body.1", "conv", "last"]
    assert len(check_layers) == len(set(check_layers)) == 7
    assert blocks[3].nodes == ("conv",)  # the addition reads two blocks and belongs to `last`
    assert set(blocks[4].inputs) == {"first", "conv"}


def test_features_that_are_read_again_later_do_not_hide_blocks() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        x = self.first(x)
        y = self.second(x)
        return torch.cat((self.a(x), self.b(y)), dim=1)

    layers = {"a": nn.Conv2d(4, 2, 1), "b": nn.Conv2d(4, 2, 1)}
    graph_module = annotated(
        make(forward, first=Residual(4, 4), second=Residual(4, 4), **layers), image(4)
    )
    blocks = partition_blocks(graph_module)
    check(graph_module, blocks)
    assert names(blocks) == ["first", "second", "a", "b"]


def test_inputs_that_meet_are_inputs_of_the_block_that_reads_them() -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        return self.last(torch.add(self.left(x), self.right(y)))

    layers = {name: nn.Conv2d(3, 3, 1) for name in ("left", "right", "last")}
    graph_module = annotated(make(forward, **layers), image(), image())
    blocks = partition_blocks(graph_module)
    check(graph_module, blocks)
    assert [block.inputs for block in blocks] == [("x",), ("y",), ("left", "right")]


def test_an_input_read_twice_belongs_to_no_block() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.cat((self.left(x), self.right(x)), dim=1)

    layers = {name: nn.Conv2d(3, 3, 1) for name in ("left", "right")}
    graph_module = simulated(annotated(make(forward, **layers), image()))
    blocks = partition_blocks(graph_module, "layer")
    assert [block.inputs for block in blocks] == [("x_q",), ("x_q",)]


def test_constants_and_sizes_come_along() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.add(self.conv(x), self.shift)
        return self.fc(torch.reshape(x, (x.size(0), -1)))

    model = make(forward, conv=nn.Conv2d(3, 2, 1), shift=torch.ones(1), fc=nn.Linear(128, 2))
    conv, head = partition_blocks(annotated(model, image()))
    assert conv.nodes == ("conv", "shift", "add")
    assert head.nodes == ("size", "reshape", "fc")
    assert head.inputs == ("add",)


@pytest.mark.parametrize("granularity", ["layer", "block", "stage", "model"])
@pytest.mark.parametrize("model", [ResNet, Transformer])
def test_the_simulated_graph_has_the_same_blocks(model: Any, granularity: Any) -> None:
    graph_module = fused(model())
    before = partition_blocks(graph_module, granularity)
    after = partition_blocks(simulated(graph_module), granularity)
    check(graph_module, after)
    assert names(before) == names(after)
    for plain, quantized in zip(before, after, strict=True):
        assert set(plain.nodes) <= set(quantized.nodes)
        assert quantized.output == f"{plain.output}_q"
        assert "x_q" in quantized.nodes or "x" not in plain.inputs


def test_an_output_also_read_as_it_is_leaves_its_quantizer_to_the_reader() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.first(x)
        return torch.add(y, self.second(torch.exp(y)))

    model = chain(make(forward, first=nn.Conv2d(3, 3, 1), second=nn.Conv2d(3, 3, 1)))
    graph_module = simulated(annotated(model, image()), raw=["add"])
    first, second = partition_blocks(graph_module)
    assert first.output == "b0_first"
    assert (second.inputs, second.nodes[0]) == (("b0_first",), "b0_first_q")


def test_a_selector_names_a_block() -> None:
    graph_module = fused(ResNet())
    blocks = partition_blocks(graph_module, named=[lambda path: path == "layer1"])
    check(graph_module, blocks)
    assert names(blocks) == ["stem", "layer1", "layer2.0", "layer2.1", "fc"]
    assert rules(blocks) == ["layer", "named", "residual", "residual", "layer"]
    stages = partition_blocks(graph_module, "stage", [lambda path: path == "layer2.0"])
    assert names(stages) == ["stem..layer1", "layer2.0", "layer2.1", "fc"]


@pytest.mark.parametrize(
    ("selectors", "reason"),
    [
        ([lambda path: path == "layer9"], "named block 1 holds no layer"),
        ([lambda path: path in ("layer1.0.conv1", "fc")], r"2 outputs \(fc, layer1_0_conv1\)"),
        (
            [lambda path: path == "layer1.0", lambda path: path == "layer1"],
            "named block 2 shares layer1_0_conv1",
        ),
    ],
)
def test_declines_what_is_no_block(selectors: Any, reason: str) -> None:
    with pytest.raises(UnsupportedGraphError, match=reason):
        partition_blocks(fused(ResNet()), named=selectors)


def test_refuses_an_unknown_granularity() -> None:
    with pytest.raises(ValueError, match="granularity must be one of"):
        partition_blocks(fused(ResNet()), "module")  # type: ignore[arg-type]


def test_a_graph_without_layers_has_no_blocks() -> None:
    graph_module = annotated(make(lambda self, x: torch.exp(x)), image())
    assert partition_blocks(graph_module) == ()
    assert format_tree(()) == ""


def test_several_outputs_leave_the_layers_behind_them_apart() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        x = self.body(x)
        return self.a(x), self.b(x)

    layers = {"a": nn.Conv2d(3, 2, 1), "b": nn.Conv2d(3, 2, 1)}
    graph_module = annotated(make(forward, body=Residual(3, 3), **layers), image())
    assert names(partition_blocks(graph_module)) == ["body", "a", "b"]
    assert names(partition_blocks(graph_module, "model")) == ["body", "a", "b"]


def test_an_unfused_batch_norm_belongs_to_its_layer() -> None:
    model = chain(nn.Conv2d(3, 4, 1), batch_norm(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
    first, second = partition_blocks(annotated(model, image()), "layer")
    assert first.nodes == ("b0", "b1", "b2")
    assert second.nodes == ("b3",)


def test_works_without_shapes() -> None:
    graph = float_graph(Residual(3, 3))
    assert names(partition_blocks(graph)) == ["conv1..conv2"]


def test_partitions_a_large_graph_quickly() -> None:
    graph, root = fx.Graph(), nn.Module()
    node = graph.placeholder("x")
    for index in range(400):
        root.add_module(f"conv{index}", nn.Conv2d(1, 1, 1))
        node = graph.call_function(torch.add, (graph.call_module(f"conv{index}", (node,)), node))
    graph.output(node)
    graph_module = fx.GraphModule(root, graph)
    assert len(partition_blocks(graph_module)) == 400
    assert sum(map(is_quantizer, graph.nodes)) == 0
