"""Plots of result files. Without matplotlib they are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {
    "flashcore": "#d1495b",
    "flashcore-avx2": "#edae49",
    "torch": "#2e4057",
    "onnxruntime": "#66a182",
    "openvino": "#00798c",
    "jax": "#8d6a9f",
    "numpy": "#9a9a9a",
    "deterministic": "#edae49",
    "cudnn": "#66a182",
    "fa2": "#2e4057",
    "fa3": "#00798c",
    "fa4": "#edae49",
    "flex": "#8d6a9f",
    "eager": "#9a9a9a",
    "dense": "#9a9a9a",
}


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "grid.color": "#e6e6e6",
            "axes.axisbelow": True,
            "legend.frameon": False,
            "figure.dpi": 150,
            "savefig.bbox": "tight",
        }
    )
    return plt


def bars(axis: Any, cells: list[dict[str, Any]], value: str, labels: list[str]) -> None:
    """One group of bars per cell, one bar per peer; a peer with no number leaves a gap."""
    names = list(dict.fromkeys(c["cell"] for c in cells))
    peers = list(dict.fromkeys(c["peer"] for c in cells if value in c))
    found = {(c["cell"], c["peer"]): c.get(value) for c in cells}
    width = 0.8 / max(1, len(peers))
    for i, peer in enumerate(peers):
        places = [n + (i - (len(peers) - 1) / 2) * width for n in range(len(names))]
        heights = [found.get((name, peer)) or 0 for name in names]
        colour = COLOURS.get(peer, "#777777")
        axis.bar(places, heights, width=0.92 * width, label=peer, color=colour)
    axis.set_xticks(range(len(names)), labels, fontsize=7)


def cpu(result: dict[str, Any], path: Path) -> None:
    """Rows: direction; columns: dtype. One thread, GFLOP/s."""
    plt = pyplot()
    if plt is None:
        return
    cells = [c for c in result["cells"] if c["threads"] == 1 and "-q1k" not in c["cell"]]
    directions = list(dict.fromkeys(c["direction"] for c in cells))
    dtypes = list(dict.fromkeys(c["cell"].rsplit("-", 1)[1] for c in cells))
    if not cells:
        return
    figure, axes = plt.subplots(
        len(directions),
        len(dtypes),
        figsize=(5.2 * len(dtypes), 3 * len(directions)),
        squeeze=False,
    )
    handles: dict[str, Any] = {}
    for row, direction in zip(axes, directions):
        for axis, dtype in zip(row, dtypes):
            chosen = [
                c for c in cells if c["direction"] == direction and c["cell"].endswith(f"-{dtype}")
            ]
            names = list(dict.fromkeys(c["cell"] for c in chosen))
            bars(axis, chosen, "gflops", [short_label(name) for name in names])
            title = {"fwd": "forward", "bwd": "backward"}[direction]
            axis.set_title(f"{title}, {dtype}", loc="left", fontsize=10, fontweight="bold")
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels())))
        row[0].set_ylabel("GFLOP / CPU second")
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="upper center",
        ncols=len(handles),
        bbox_to_anchor=(0.5, 1.04),
    )
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def short_label(cell: str) -> str:
    parts = cell.split("-")
    return f"d{parts[0][2:]}\n{parts[2]}\n{parts[4]}\n{parts[1]}"


def gpu(result: dict[str, Any], path: Path) -> None:
    """One panel per head dim and mask: TFLOP/s over the cells, the matmul rate as a line."""
    plt = pyplot()
    if plt is None:
        return
    panels: dict[str, list[dict[str, Any]]] = {}
    for c in result["cells"]:
        head_dim, mask = c["cell"].split("-")[:2]
        panels.setdefault(f"{head_dim}, {mask}", []).append(c)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.6 * columns, 2.7 * rows), squeeze=False)
    handles: dict[str, Any] = {}
    ceiling = sum(result["matmul_tflops"]) / len(result["matmul_tflops"])
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, cells) in zip(axes.flat, panels.items()):
        names = list(dict.fromkeys(c["cell"] for c in cells))
        bars(axis, cells, "tflops", ["\n".join(name.split("-")[2:5]) for name in names])
        axis.axhline(ceiling, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axis.set_ylabel("TFLOP/s")
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels())))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="upper center",
        ncols=len(handles),
        bbox_to_anchor=(0.5, 1.03),
    )
    direction = {"fwd": "forward", "bwd": "backward"}[result["direction"]]
    note = f"{result['device']}, {direction}. Dashed: 8192³ bf16 matmul, {ceiling:.0f} TFLOP/s"
    figure.text(0.01, -0.015, note, fontsize=8, color="#555555")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def sparse(result: dict[str, Any], path: Path) -> None:
    """Time of each peer against density (a panel per length) or against length; both log-log."""
    plt = pyplot()
    if plt is None:
        return
    cells = [c for c in result["cells"] if "us" in c]
    over, label = ("density", "kept blocks") if result["set"] == "density" else ("seqlen", "keys")
    panels: dict[str, list[dict[str, Any]]] = {}
    for c in cells:
        parts = c["cell"].split("-")
        title = f"{parts[0]}, {parts[2]}, blocks of {parts[1].rsplit('x', 1)[1]}"
        panels.setdefault(title if over == "density" else parts[0], []).append(c)
    panels = {title: rows for title, rows in panels.items() if len({c[over] for c in rows}) > 1}
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), squeeze=False)
    for axis, (title, rows) in zip(axes.flat, panels.items()):
        for peer in dict.fromkeys(c["peer"] for c in rows):
            mine = sorted((c[over], c["us"]) for c in rows if c["peer"] == peer)
            axis.plot(*zip(*mine), marker="o", label=peer, color=COLOURS.get(peer, "#777777"))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel(label)
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.flat[0].set_ylabel("microseconds")
    axes.flat[0].legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
