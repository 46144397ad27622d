from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from passes import Rewriter
from passes.infra.stored import get_tensor
from tests.passes.checking import float_graph
from tests.passes.models import annotated, image, make


def nodes(graph_module: fx.GraphModule) -> list[str]:
    return [node.name for node in graph_module.graph.nodes]


def node(graph_module: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in graph_module.graph.nodes if node.name == name)


def tanh_relu() -> fx.GraphModule:
    return annotated(make(lambda self, x: torch.exp(F.relu(torch.tanh(x)))), image())


def test_replace_call_keeps_name_place_and_meta() -> None:
    graph_module = tanh_relu()
    old = node(graph_module, "relu")
    info, old_meta = old.meta["tensor"], dict(old.meta)
    rewriter = Rewriter(graph_module)
    new = rewriter.replace_call(old, F.relu6, old.args)
    assert rewriter.finish()
    assert nodes(graph_module) == ["x", "tanh", "relu", "exp", "output"]
    assert new.target is F.relu6
    assert new.meta["tensor"] == info
    assert new.meta["module_path"] == old_meta["module_path"]
    assert torch.equal(graph_module(image()), torch.exp(F.relu6(torch.tanh(image()))))


def test_replace_call_keeps_a_numbered_name() -> None:
    graph_module = float_graph(make(lambda self, x: F.relu(F.relu(F.relu(x)))))
    old = node(graph_module, "relu_1")
    Rewriter(graph_module).replace_call(old, torch.tanh, old.args)
    assert nodes(graph_module) == ["x", "relu", "relu_1", "relu_2", "output"]
    # The name is taken, and nothing else gets it.
    with graph_module.graph.inserting_before(graph_module.graph.output_node()):
        other = graph_module.graph.call_function(F.relu, (node(graph_module, "relu"),))
    assert other.name not in ("relu", "relu_1", "relu_2")


def test_new_nodes_inherit_the_origins_of_all_sources() -> None:
    graph_module = tanh_relu()
    relu, tanh = node(graph_module, "relu"), node(graph_module, "tanh")
    rewriter = Rewriter(graph_module)
    with rewriter.before(relu):
        new = rewriter.call_function(torch.sin, tanh.args, like=relu, sources=[tanh, relu])
    assert new.meta["origin"] == ("relu", "tanh")


def test_a_new_value_has_no_tensor_info() -> None:
    graph_module = tanh_relu()
    relu = node(graph_module, "relu")
    rewriter = Rewriter(graph_module)
    with rewriter.after(relu):
        new = rewriter.call_function(torch.sum, (relu,), like=relu, same_value=False)
    assert "tensor" not in new.meta
    assert nodes(graph_module).index(new.name) == 3


def test_absorb_lets_users_read_the_heir() -> None:
    graph_module = tanh_relu()
    rewriter = Rewriter(graph_module)
    tanh = rewriter.absorb(node(graph_module, "relu"), node(graph_module, "tanh"))
    rewriter.finish()
    assert nodes(graph_module) == ["x", "tanh", "exp", "output"]
    assert tanh.meta["origin"] == ("tanh", "relu")


def test_absorb_can_bypass_a_node_in_front() -> None:
    graph_module = tanh_relu()
    rewriter = Rewriter(graph_module)
    rewriter.absorb(node(graph_module, "tanh"), node(graph_module, "relu"), bypass=True)
    rewriter.finish()
    assert nodes(graph_module) == ["x", "relu", "exp", "output"]
    assert node(graph_module, "relu").meta["origin"] == ("relu", "tanh")
    assert torch.equal(graph_module(image()), torch.exp(F.relu(image())))


def test_redirect_moves_only_the_users_asked_for() -> None:
    model = make(lambda self, x: (torch.exp(y := F.relu(x)), torch.sin(y)))
    graph_module = annotated(model, image())
    relu, x = node(graph_module, "relu"), node(graph_module, "x")
    rewriter = Rewriter(graph_module)
    rewriter.redirect(relu, x, lambda user: user.target is torch.sin)
    assert node(graph_module, "sin").args == (x,)
    assert node(graph_module, "exp").args == (relu,)


def test_redirect_does_not_close_a_circle() -> None:
    graph_module = tanh_relu()
    relu = node(graph_module, "relu")
    rewriter = Rewriter(graph_module)
    with rewriter.after(relu):
        new = rewriter.call_function(torch.sin, (relu,), like=relu)
    rewriter.redirect(relu, new)
    assert new.args == (relu,)
    assert node(graph_module, "exp").args == (new,)


def test_move_before() -> None:
    model = make(lambda self, x: torch.add(torch.tanh(x), torch.sin(x)))
    graph_module = annotated(model, image())
    rewriter = Rewriter(graph_module)
    rewriter.move_before(node(graph_module, "tanh"), node(graph_module, "add"))
    assert rewriter.finish()
    assert nodes(graph_module) == ["x", "sin", "tanh", "add", "output"]
    again = Rewriter(graph_module)
    again.move_before(node(graph_module, "tanh"), node(graph_module, "add"))
    assert not again.finish()


def test_set_call_sees_whether_anything_changes() -> None:
    graph_module = tanh_relu()
    relu = node(graph_module, "relu")
    rewriter = Rewriter(graph_module)
    rewriter.set_call(relu, relu.args, relu.kwargs)
    assert not rewriter.modified
    rewriter.set_call(relu, relu.args, {"inplace": True})
    assert rewriter.modified


def test_finish_without_change_says_so() -> None:
    assert not Rewriter(tanh_relu()).finish()


def test_finish_erases_dead_code_and_unused_modules() -> None:
    graph_module = annotated(
        make(lambda self, x: F.relu(self.conv(x)), conv=nn.Conv2d(3, 3, 1)), image()
    )
    rewriter = Rewriter(graph_module)
    relu = node(graph_module, "relu")
    relu.replace_input_with(node(graph_module, "conv"), node(graph_module, "x"))
    assert rewriter.finish()
    assert nodes(graph_module) == ["x", "relu", "output"]
    assert list(graph_module.named_children()) == []


def test_finish_keeps_inputs_that_nothing_reads() -> None:
    graph_module = annotated(make(lambda self, x, y: F.relu(x)), image(), image())
    assert not Rewriter(graph_module).finish()
    assert nodes(graph_module)[:2] == ["x", "y"]


def test_call_module_puts_the_module_in_place() -> None:
    graph_module = tanh_relu()
    relu = node(graph_module, "relu")
    rewriter = Rewriter(graph_module)
    with rewriter.before(relu):
        new = rewriter.call_module("a.b", nn.ReLU6(), relu.args, like=relu)
    rewriter.replace(relu, new)
    rewriter.finish()
    assert new.name == "a_b"
    assert isinstance(graph_module.get_submodule("a.b"), nn.ReLU6)
    assert graph_module(image()).isfinite().all()


def test_call_method() -> None:
    graph_module = tanh_relu()
    relu = node(graph_module, "relu")
    rewriter = Rewriter(graph_module)
    with rewriter.before(relu):
        new = rewriter.call_method("contiguous", relu.args, like=relu, same_value=True)
    rewriter.replace(relu, new)
    assert new.op == "call_method"
    assert new.meta["tensor"].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("path", ["scale", "conv.weight_scale", "new.place.scale"])
def test_get_attr_stores_the_tensor(path: str) -> None:
    graph_module = annotated(make(lambda self, x: self.conv(x), conv=nn.Conv2d(3, 3, 1)), image())
    conv = node(graph_module, "conv")
    rewriter = Rewriter(graph_module)
    with rewriter.after(conv):
        scale = rewriter.get_attr(path, torch.tensor(2.0), like=conv)
    with rewriter.after(scale):
        product = rewriter.call_function(torch.mul, (conv, scale), like=conv)
    rewriter.redirect(conv, product)
    rewriter.finish()
    assert torch.equal(get_tensor(graph_module, path), torch.tensor(2.0))
    assert torch.equal(graph_module(image()), graph_module.conv(image()) * 2)


def test_get_attr_replaces_a_parameter() -> None:
    graph_module = annotated(make(lambda self, x: self.conv(x), conv=nn.Conv2d(3, 3, 1)), image())
    rewriter = Rewriter(graph_module)
    codes = torch.zeros(3, 3, 1, 1, dtype=torch.int8)
    with rewriter.before(node(graph_module, "conv")):
        rewriter.get_attr("conv.weight", codes, like=node(graph_module, "conv"))
    assert get_tensor(graph_module, "conv.weight") is codes
