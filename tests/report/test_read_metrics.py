from pathlib import Path

import pytest

from lmoe.errors import CheckpointError
from lmoe.report.curves import domain_losses, read_metrics
from lmoe.report.page import is_shown


def test_empty_cells_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,train/loss,val/loss\r\n0,,5.5\r\n1,4.25,\r\n2,4.0,3.5\r\n")
    assert read_metrics(path) == {"train/loss": [(1, 4.25), (2, 4.0)], "val/loss": [(0, 5.5), (2, 3.5)]}


@pytest.mark.parametrize("torn", ["2", "2,", "2,3.1", "2,3.12,4", "2,3.12,4.56"])
def test_a_torn_last_line_is_dropped(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(f"step,train/loss,val/loss\n1,4.25,5.5\n{torn}")
    assert read_metrics(path) == {"train/loss": [(1, 4.25)], "val/loss": [(1, 5.5)]}


def test_a_short_row_and_a_cell_that_is_no_number_spoil_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,a,b\n1,1.0,oops\n2,2.0\nthree,3.0,3.0\n4,4.0,4.0,extra\n")
    assert read_metrics(path) == {"a": [(1, 1.0), (2, 2.0), (4, 4.0)], "b": [(4, 4.0)]}


def test_the_later_row_of_a_step_counts_and_steps_ascend(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,a\n1,1.0\n3,3.0\n2,2.0\n3,3.5\n")
    assert read_metrics(path) == {"a": [(1, 1.0), (2, 2.0), (3, 3.5)]}


def test_an_empty_file_has_no_metrics_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("")
    assert read_metrics(tmp_path / "metrics.csv") == {}
    with pytest.raises(CheckpointError, match=r"absent\.csv"):
        read_metrics(tmp_path / "absent.csv")


def test_what_routing_does_for_a_domain_called_loss_is_no_curve_of_a_loss() -> None:
    names = ["val/loss", "val/loss/loss", "val/code 2/loss", "val/routing/knock_out/0/loss", "val/routing/load/0/loss"]
    assert list(domain_losses({name: [(0, 1.0)] for name in names})) == ["loss", "code 2"]
    assert [name for name in names if is_shown(name)] == names[:3]
