"""What a compile shows of its stages and passes, and what it leaves when one breaks its promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import fxquant
from fxquant.errors import CompileError, InputError, ModelError
from passes import Pass, PassResult, Pipeline, VerificationError
from passes.infra.listing import to_dot, to_json, to_text
from passes.infra.reproducer import load_reproducer
from tests.fxquant.small_networks import compiled, conv_net, module

# -- what is printed -----------------------------------------------------------------------------


def test_verbose_prints_every_diff(capsys: pytest.CaptureFixture[str]) -> None:
    compiled(verbose=True)
    printed = capsys.readouterr().out
    for name in ("fold_batch_norm", "fuse_conv_bn_relu", "insert_quant_dequant"):
        assert f"== {name}" in printed
    assert "batchnorm2d 1 -> 0" in printed


def test_single_passes_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    compiled(diff_passes=["fold_batch_norm"])
    printed = capsys.readouterr().out
    assert printed.count("== ") == 1


def test_an_unknown_pass_is_refused_before_the_work() -> None:
    def never() -> Any:
        raise AssertionError
        yield

    with pytest.raises(InputError, match=r"no pass 'fold_batchnorm'.*mean 'fold_batch_norm'"):
        compiled(diff_passes=["fold_batchnorm"], calibration=never())
    with pytest.raises(InputError, match=r"no pass 'merge_branches' runs .* target reference"):
        compiled(diff_passes=["merge_branches"], target="reference", calibration=never())


def test_every_pass_that_ran_could_be_asked_for() -> None:
    changes = {"equalize": True, "smooth_quant": 0.5, "bias_correction": True}
    for target in ("x86", "reference"):
        report = compiled(changes=changes, target=target).report
        ran = {record.name for record in (*report.passes, *report.target_passes)}
        compiled(changes=changes, target=target, diff_passes=sorted(ran))


def test_changed_weights_are_in_the_diff_and_in_the_report(
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {"equalize": True, "bias_correction": True}
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    report = compiled(model, changes, verbose=True).report
    printed = capsys.readouterr().out
    assert "outputs divided by" in printed.split("== equalize")[1].split("==")[0]
    assert "bias moved by" in printed.split("== correct_bias")[1].split("==")[0]
    verified = {row["name"]: row["verified"] for row in report.to_json()["passes"]}
    assert (verified["equalize"], verified["correct_bias"]) == ("same outputs", "runs")
    assert "same outputs" in str(report)


def test_stages_are_dumped_when_they_are_finished(tmp_path: Any) -> None:
    changes = {"equalize": True, "bias_correction": True, "weights.bits": 4}
    q = compiled(changes=changes, dump=tmp_path)
    suffixes = {"txt": to_text, "json": to_json, "dot": to_dot}
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{stage}.{suffix}" for stage in q.stages for suffix in suffixes
    }
    for stage, graph_module in q.stages.items():
        for suffix, form in suffixes.items():
            assert (tmp_path / f"{stage}.{suffix}").read_text() == form(graph_module)


def test_the_dumped_fused_graph_has_what_was_split(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 4)).eval()
    model[0].weight.data[3] *= 1000  # type: ignore[operator,index]
    compiled(model, {"split_outliers": 4.0}, calibration=torch.randn(8, 4), dump=tmp_path)
    assert "_outliers = linear(" in (tmp_path / "fused.txt").read_text()


def test_the_dumped_simulated_graph_has_its_grids(tmp_path: Any) -> None:
    q = compiled(dump=tmp_path)
    text = (tmp_path / "simulated.txt").read_text()
    for row in q.report.quantizers:
        assert row.grid in text
    assert "scale" in q.report.quantizers[0].grid


# -- what breaks ---------------------------------------------------------------------------------


class HalveEverything(Pass):
    """Says that it is exact."""

    exact = True

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        for node in list(graph_module.graph.nodes):
            if node.op == "output":
                with graph_module.graph.inserting_before(node):
                    half = graph_module.graph.call_function(torch.mul, (node.args[0], 0.5))
                half.meta |= {"origin": ("half",), "module_path": ""}
                node.args = (half,)
        graph_module.recompile()
        return PassResult(modified=True)


class LoseProvenance(HalveEverything):
    exact = False

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        result = super().run(graph_module)
        next(iter(graph_module.graph.find_nodes(op="call_function", target=torch.mul))).meta.clear()
        return result


class QuantizeTwice(Pass):
    """Puts a quantizer behind a quantizer."""

    exact = False

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        quantized = next(n for n in graph_module.graph.nodes if n.name.endswith("_q"))
        with graph_module.graph.inserting_after(quantized):
            again = graph_module.graph.call_module(str(quantized.target), (quantized,))
        quantized.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
        graph_module.recompile()
        return PassResult(modified=True)


def test_a_broken_pass_leaves_a_reproducer(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("fxquant.plan.stage_passes.EliminateNoops", HalveEverything)
    folder = tmp_path / "reproduce_halve_everything"
    with pytest.raises(CompileError, match=f"is exact but output differs.*{folder}"):
        compiled(dump=tmp_path)
    graph_module, probe = load_reproducer(folder)
    with pytest.raises(VerificationError, match="halve_everything: is exact but output differs"):
        Pipeline([HalveEverything()]).run(graph_module, probe)
    assert fxquant.Recipe.from_toml(folder / "recipe.toml") == fxquant.Recipe.named("w8a8")


def test_without_a_dump_the_reproducer_has_a_temporary_folder(
    tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("fxquant.plan.stage_passes.EliminateNoops", HalveEverything)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(CompileError, match=str(tmp_path)) as caught:
        compiled()
    (folder,) = tmp_path.glob("fxquant_*/reproduce_halve_everything")
    assert str(folder) in str(caught.value)
    assert {path.name for path in folder.iterdir()} == {
        "before.txt", "before.pt", "error.txt", "recipe.toml",
    }  # fmt: skip


def test_the_promise_of_the_float_graph_is_checked_after_each_pass(monkeypatch: Any) -> None:
    monkeypatch.setattr("fxquant.plan.stage_passes.EliminateNoops", LoseProvenance)
    with pytest.raises(CompileError, match=r"lose_provenance: .*mul lost its origin"):
        compiled()


def test_the_promise_of_the_simulated_graph_is_checked_after_each_pass(monkeypatch: Any) -> None:
    monkeypatch.setattr("fxquant.simulate.simulation_passes.AssignOneSided", QuantizeTwice)
    with pytest.raises(CompileError, match=r"quantize_twice: .*which is quantized"):
        compiled()


def test_a_model_that_is_not_what_was_traced_is_refused() -> None:
    model = module(lambda self, x: self.conv(x) * torch.rand(()).item(), conv=nn.Conv2d(3, 4, 1))
    with pytest.raises(ModelError, match="gives other outputs when it is called again"):
        compiled(model)


def test_the_plan_follows_the_copies_of_its_graph() -> None:
    q = compiled()
    for stage in ("fused", "simulated"):
        q.plan.check(q.stages[stage].graph)  # type: ignore[union-attr]
    with pytest.raises(CompileError, match="plan: the graph has no nodes"):
        q.plan.check(compiled(conv_net()).stages["fused"].graph)  # type: ignore[union-attr]
