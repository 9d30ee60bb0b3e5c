"""Figures and tables by layer: CKA with bands, null and anchors, heatmaps, norms, further sites."""

from __future__ import annotations

from collections.abc import Sequence

from remend.files.atomic import JsonRow
from remend.report.charts import Heatmap, Level, Lines, Series
from remend.report.page import Block, Figure, Table
from remend.report.svg import Point, style
from remend.report.words import number, percent

MOST_CELLS = 5000
"""Heatmaps of more cells, all together, say no values when hovered: the page would grow beyond 2 MB."""

Students = Sequence[JsonRow]


def student_style(number: int) -> str:
    """The class of the number-th student: the first, mostly the damaged one, has the warm colour."""
    return style((1, 0)[number] if number < 2 else number)


def cka_series(students: Students, prefix: str = "", first: int = 0) -> list[Series]:
    """A line with its band for each student, over the reference's layers."""
    return [
        _series(f"{prefix}{student['name']}", student_style(first + i), student["layers"])
        for i, student in enumerate(students)
    ]


def _series(name: str, css: str, layers: Students) -> Series:
    points: list[Point] = [(float(layer["reference_layer"]), layer["cka"]) for layer in layers]
    band = [(float(layer["reference_layer"]), layer["cka_low"], layer["cka_high"]) for layer in layers]
    return Series(name, css, points, dots=True, band=band, titles=[_said(name, layer) for layer in layers])


def _said(name: str, layer: JsonRow) -> str:
    place = f"layer {layer['layer']}"
    if layer["reference_layer"] != layer["layer"]:
        place += f" (the reference's {layer['reference_layer']})"
    ends = f"{number(layer['cka_low'])} to {number(layer['cka_high'])}"
    return f"{name}, {place}: CKA {number(layer['cka'])} ({ends})"


def anchors(students: Students) -> list[Series]:
    """The reference on a re-run and at random weights, by its layer."""
    names = {"rerun": "the reference, run again", "random": "random weights"}
    lines = []
    for key, name in names.items():
        values = {
            float(layer["reference_layer"]): layer[key]
            for student in students
            for layer in student["layers"]
            if layer.get(key) is not None
        }
        if values:
            lines.append(Series(name, key, sorted(values.items())))
    return lines


def null_level(students: Students) -> list[Level]:
    """What shuffled rows reach at most, over all students."""
    values = [student["null_max"] for student in students if student.get("null_max") is not None]
    return [Level("most that shuffled rows reach", "null", max(values))] if values else []


def layer_figures(students: Students, estimator: JsonRow) -> list[Block]:
    """CKA by layer of all students in one chart."""
    rows = ", ".join(f"{student['rows']} rows for {student['name']}" for student in students)
    chart = Lines(
        "CKA with the reference, by layer",
        [*cka_series(students), *anchors(students)],
        x_label="layer of the reference",
        y_label="CKA",
        low=0.0,
        high=1.0,
        levels=null_level(students),
    )
    return [
        Figure(
            [chart],
            see="1 is the reference's own geometry; a model at the dotted line is no more like it than chance. Look "
            "for the layer where a line falls: the damage enters there and what follows inherits it.",
            measured=f"Measure: {estimator['name']}, {estimator['site']}; {rows}; {estimator['row_policy']}. Bands: "
            f"{estimator['interval']}. Dotted: {estimator['null']}.",
        )
    ]


def changes(students: Students) -> list[Block]:
    """How CKA changed from the damaged to the recovered, by layer; nothing where no pair is there."""
    series = []
    for i, student in enumerate(students):
        pair = student.get("compared_with")
        if pair and pair["layers"]:
            rows = pair["layers"]
            name = f"{pair['name']} → {student['name']}"
            points: list[Point] = [(float(row["reference_layer"]), row["change"]) for row in rows]
            band = [(float(row["reference_layer"]), row["low"], row["high"]) for row in rows]
            said = [
                f"{name}, layer {row['reference_layer']}: {number(row['change'], '+.3f')} "
                f"({number(row['low'], '+.3f')} to {number(row['high'], '+.3f')})"
                for row in rows
            ]
            series.append(Series(name, student_style(i), points, dots=True, band=band, titles=said))
    if not series:
        return []
    chart = Lines(
        "Change of CKA, paired on the same rows",
        series,
        x_label="layer of the reference",
        y_label="change of CKA",
        levels=[Level("no change", "random", 0.0)],
    )
    return [
        Figure(
            [chart],
            see="Above zero a layer came nearer to the reference, below it moved away. A band that does not cross zero "
            "is a change beyond the noise of the rows.",
            measured="CKA after minus CKA before, both against the reference on the same rows; 95% intervals of the "
            "difference by delete-group jackknife.",
        )
    ]


_COLUMNS = ("layer", "reference's", "CKA", "95%", "relative L2", "Procrustes", "shared neighbours", "rerun", "random")


def layer_tables(students: Students) -> list[Block]:
    """All measures of every layer, folded away; a table for each student."""
    return [
        Table(_COLUMNS, _layer_rows(student["layers"]), folded=f"Every layer of {student['name']}", caption=_ABOUT)
        for student in students
    ]


_ABOUT = (
    "CKA and shared neighbours: 1 is alike, 0 unrelated. Relative L2 error and Procrustes distance: 0 is alike. Rerun "
    "and random are the CKA of the reference with itself run again and with random weights."
)


def _layer_rows(layers: Students) -> list[list[str]]:
    return [
        [
            str(layer["layer"]),
            str(layer["reference_layer"]),
            number(layer["cka"]),
            f"{number(layer['cka_low'])} to {number(layer['cka_high'])}",
            *(number(layer.get(key)) for key in ("l2", "procrustes", "knn", "rerun", "random")),
        ]
        for layer in layers
    ]


def grids(students: Students, estimator: JsonRow) -> Figure:
    """Every layer of each student against every layer of the reference."""
    cells = sum(len(row) for student in students for row in student["grid"])
    charts = [
        Heatmap(
            f"Every layer against every layer: {student['name']}",
            student["grid"],
            "the reference's layer",
            "its layer",
            hover=cells <= MOST_CELLS,
        )
        for student in students
    ]
    return Figure(
        charts,
        see="Brighter is more alike. In a healthy copy the diagonal is the brightest of its row and column; a dark "
        "band is a layer that is like none of the reference's; a shifted diagonal says that layers do others' work.",
        measured=f"Measure: {estimator['name']}, of every pair of layers on the same rows; values below 0 "
        "are drawn as 0.",
    )


def sites(students: Students) -> list[Block]:
    """CKA by layer of further sites (attention, mlp), where they were measured."""
    names = dict.fromkeys(site for student in students for site in student["sites"])
    charts = []
    for site in names:
        there = [(i, student["sites"][site]) for i, student in enumerate(students) if site in student["sites"]]
        series = [_series(students[i]["name"], student_style(i), site_of["layers"]) for i, site_of in there]
        charts.append(
            Lines(
                f"CKA of the {site} outputs",
                series,
                x_label="layer of the reference",
                y_label="CKA",
                high=1.0,
                levels=null_level([site_of for _, site_of in there]),
            )
        )
    if not charts:
        return []
    return [
        Figure(
            [chart],
            see="The same for what one part of each block adds to the residual stream: it shows which part is damaged "
            "where the stream as a whole hides it.",
            measured="Estimator, rows and intervals as above; anchors are measured on the residual stream alone.",
        )
        for chart in charts
    ]


_NORM_COLUMNS = ("layer", "median norm", "largest norm", "massive rows", "top dimension", "its share of variance")


def norms(students: Students) -> list[Block]:
    """Norms and outlier dimensions of the reference and of each student, folded away, and in a sentence."""
    tables = [("the reference", students[0]["norms"]["reference"])]
    tables += [(student["name"], student["norms"]["student"]) for student in students]
    worst = [(name, max(rows, key=lambda r: r["top_dimension_share"] or 0.0)) for name, rows in tables if rows]
    summary = Table(
        ["", "layer", "dimension", "share of variance", "largest over median norm"],
        [
            [
                name,
                str(row["layer"]),
                str(row["top_dimension"]),
                percent(row["top_dimension_share"]),
                _ratio(rows),
            ]
            for (name, row), (_, rows) in zip(worst, [t for t in tables if t[1]], strict=True)
        ],
        caption="The layer in which one dimension holds the largest share of all variance. Massive tokens and outlier "
        "dimensions can decide a CKA alone, so rows with a massive norm are left out of it.",
    )
    folded = [Table(_NORM_COLUMNS, _norm_rows(rows), folded=f"Norms of {name}, by layer") for name, rows in tables]
    return [summary, *folded]


def _ratio(rows: Students) -> str:
    values = [row["largest_norm"] / row["median_norm"] for row in rows if row["largest_norm"] and row["median_norm"]]
    return f"{max(values):.1f}" if values else "–"


def _norm_rows(rows: Students) -> list[list[str]]:
    return [
        [
            str(row["layer"]),
            number(row["median_norm"], ".1f"),
            number(row["largest_norm"], ".1f"),
            str(row["massive"]),
            str(row["top_dimension"]),
            percent(row["top_dimension_share"]),
        ]
        for row in rows
    ]
