"""Draw curves as an SVG that is readable on white and on dark: columns of the log.jsonl of several runs over their
steps, or one's last values against a key of their configurations; of each run, or means over runs.

    python -m tools.plots out/digits out/plain --key=token_rms_first,token_rms_last --out=rms.svg
    python -m tools.plots out/rates/* --key=val_loss --by=model.block --out=loss.svg
    python -m tools.plots out/rates/* --key=val_loss --against=learning_rate --by=model.block --out=rates.svg
    python -m tools.plots out/widths/* --key=val_loss --against=learning_rate --by=model.width \
        --panels=optimizer,model.block --top=0.28 --out=widths.svg
"""

import json
import math
import tomllib
from html import escape
from pathlib import Path

import numpy as np

from plumbing.command import Parser, UserError, path_type, reading, run_main
from plumbing.files import atomic_file

COLOURS = ("#3b82c4", "#d9622b", "#2f9e5b", "#9b59b6", "#b8860b", "#7f7f7f")


def ticks(low, high):
    """Three to eight round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= max((factor for factor in (1, 2, 5) if factor * step <= (high - low) / 3), default=1)
    return np.arange(math.ceil(low / step), math.floor(high / step + 1e-9) + 1) * step


def write_svg(path, width, height, parts):
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            'font-family="sans-serif" font-size="12">')
    with atomic_file(path) as file:
        file.write("\n".join([head, *parts, "</svg>"]).encode())


def margin(curves):
    """The pixels that the names at the ends of curves take."""
    return 20 + 7 * max(map(len, curves))


def draw(curves, width, height, y0, y1, x_label, y_label, x_names):
    """The elements of one plot, as in save_plot(), whose y axis goes from y0 to y1."""
    left, right, top, bottom = 64, margin(curves), 36, 48
    y_names = {}
    if y1 > 100 * y0 > 0:
        curves = {name: [(x, math.log10(y)) for x, y in curve] for name, curve in curves.items()}
        y0, y1 = math.log10(y0), math.log10(y1)
        y_names = {y: f"{10.0**y:g}" for y in range(math.ceil(y0), math.floor(y1) + 1)}
        y_label += " (logarithmic)"
    space = 0.05 * (y1 - y0 or 1)  # above and below the curves
    y0, y1 = y0 - space, y1 + space
    xs = [x for curve in curves.values() for x, _ in curve]
    x0, x1 = min(xs), max(xs)
    if x1 == x0:
        x1 = x0 + 1

    def at(x, y):
        return (left + (x - x0) / (x1 - x0) * (width - left - right),
                height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom))

    def text(x, y, words, anchor="middle", colour="#808080"):
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'

    parts = []
    for x, name in (x_names or {x: f"{x:g}" for x in ticks(x0, x1)}).items():
        parts.append(f'<path d="M{at(x, y0)[0]:.1f} {top}V{height - bottom}" stroke="#80808040"/>')
        parts.append(text(at(x, y0)[0], height - bottom + 18, name))
    for y, name in (y_names or {y: f"{y:g}" for y in ticks(y0, y1)}).items():
        parts.append(f'<path d="M{left} {at(x0, y)[1]:.1f}H{width - right}" stroke="#80808040"/>')
        parts.append(text(left - 8, at(x0, y)[1] + 4, name, "end"))
    heights, last = {}, math.inf
    for y, name in sorted(((at(*curve[-1])[1], name) for name, curve in curves.items()), reverse=True):
        last = min(y, last - 14)  # names that would overlap move up
        heights[name] = last
    for number, (name, curve) in enumerate(curves.items()):
        colour, places = COLOURS[number % len(COLOURS)], [at(x, y) for x, y in curve]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(places) <= 20:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        parts.append(text(places[-1][0] + 8, heights[name] + 4, name, "start", colour))
    parts += [text((left + width - right) / 2, height - 10, x_label), text(left, 20, y_label, "start")]
    return parts


def save_plot(path, curves, x_label, y_label, x_names=None):
    """Write curves, {name: [(x, y), ...]}, as an SVG with a light grid. The name of a curve stands at its end. Positive
    values that differ by more than a factor of 100 are drawn on a logarithmic axis.
    x_names: {x: text} instead of round numbers below the axis."""
    values = [y for curve in curves.values() for _, y in curve]
    width, height = 490 + margin(curves), 360
    write_svg(path, width, height, draw(curves, width, height, min(values), max(values), x_label, y_label, x_names))


def save_panels(path, panels, x_label, y_label):
    """Write several plots, {title: (curves, x_names)}, as one SVG, two in a row, with one scale for all their y."""
    values = [y for curves, _ in panels.values() for curve in curves.values() for _, y in curve]
    width, height, parts = 310 + max(margin(curves) for curves, _ in panels.values()), 300, []
    for number, (title, (curves, x_names)) in enumerate(panels.items()):
        parts.append(f'<g transform="translate({number % 2 * width} {number // 2 * height})">')
        parts += draw(curves, width, height, min(values), max(values), x_label, f"{title}: {y_label}", x_names)
        parts.append("</g>")
    write_svg(path, 2 * width, math.ceil(len(panels) / 2) * height, parts)


def read_column(run, key):
    """The points (step, value) of a column of a run's log."""
    with reading(run / "log.jsonl"):
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        numbers = [{name: value for name, value in line.items() if isinstance(value, (int, float))} for line in lines]
        points = [(line["step"], float(line[key])) for line in numbers if key in line]
    if not points:
        names = sorted({name for line in numbers for name in line})
        raise UserError(f"{run}: its log has no {key}, but {', '.join(names)}")
    return points


def read_config(run, keys):
    """A run's configuration by dotted names, lists as on the command line. Raises UserError if it lacks one of `keys`,
    of which some may be None."""
    with reading(run / "config.toml"):
        config = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
        config |= {f"model.{name}": value for name, value in config["model"].items()}
        if missing := set(keys) - {None} - config.keys():
            raise ValueError(f"has no key {', '.join(map(repr, missing))}")
        return {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in config.items()}


def over_steps(runs, keys, by):
    """Columns over the steps as curves, {name: [(step, value), ...]}: one for each run, or for each value of the key
    `by` the mean over its runs, at the steps where all of them have a finite value."""
    groups = {}
    for run in runs:
        name = f"{by} = {read_config(run, [by])[by]}" if by else str(run)
        for key in keys:
            points = {step: value for step, value in read_column(run, key) if math.isfinite(value)}
            groups.setdefault(name + f" {key}" * (len(keys) > 1), []).append(points)
    curves = {}
    for name, group in groups.items():
        steps = sorted(set.intersection(*map(set, group)))
        curves[name] = [(step, np.mean([points[step] for points in group])) for step in steps]
    return curves


def last_values(runs, key, against, by):
    """The last values of a column, averaged over runs that agree in two keys of their configurations, as a table on
    the screen and as curves: {value of `by`: [(log2 of `against`, mean), ...]}. Says which runs it leaves out: those
    that are not finished, or whose value is not finite."""
    groups = {}
    for run in runs:
        step, value = read_column(run, key)[-1]
        config = read_config(run, [against, by])
        x = config[against]
        with reading(run / "config.toml"):
            if isinstance(x, str) or not x > 0:
                raise ValueError(f"{against} = {x} has no place on a logarithmic axis")
        if step < config["steps"] or not math.isfinite(value):
            print(f"left out: {run}, {value:g} after {step} of {config['steps']} steps")
        else:
            groups.setdefault((config[by] if by else None, float(x)), []).append(value)
    curves = {}
    for (of, x), values in sorted(groups.items()):
        name = f"{by} = {of}" if by else key
        spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        print(f"{name}, {against} = {x:g}: {np.mean(values):.4f}{spread} ({len(values)} runs)")
        curves.setdefault(name, []).append((math.log2(x), np.mean(values)))
    return curves


def curves_of(runs, args):
    """The curves that the options ask for, and the names below their axis."""
    if args.against:
        curves = last_values(runs, args.key[0], args.against, args.by)
        names = {x: f"{2**x:g}" for curve in curves.values() for x, _ in curve}
    else:
        curves, names = over_steps(runs, args.key, args.by), None
    if not curves or not all(curves.values()):
        raise UserError(f"{', '.join(args.key)}: nothing to draw, for want of finite values or of finished runs")
    return {name: [(x, min(y, args.top)) for x, y in curve] for name, curve in curves.items()}, names


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=path_type, help="run directories")
    parser.add_argument("--key", type=lambda text: text.split(","), default="loss",
                        help="columns of log.jsonl to draw, with commas between them (default: loss)")
    parser.add_argument("--against", metavar="KEY", help="draw the column's last values against this key")
    parser.add_argument("--by", metavar="KEY", help="one curve for each value of this key, the mean over its runs")
    parser.add_argument("--panels", metavar="KEY", type=lambda text: text.split(","), default=[],
                        help="one plot for each combination of values of these keys, with commas between them")
    parser.add_argument("--top", type=float, default=math.inf, help="draw higher values here, at the upper edge")
    parser.add_argument("--out", type=path_type, default=Path("out/plot.svg"),
                        help="the SVG to write (default: out/plot.svg)")
    args = parser.parse_args()
    if args.out.suffix != ".svg":
        raise UserError(f"--out: {args.out} is not the name of a .svg file")
    if args.against and len(args.key) > 1:
        raise UserError("--key: name one column with --against")
    x_label, y_label = args.against or "step", ", ".join(args.key)
    if math.isfinite(args.top):
        y_label += f" (cut at {args.top:g})"
    if args.panels:
        groups, panels = {}, {}
        for run in args.runs:
            config = read_config(run, args.panels)
            groups.setdefault(", ".join(str(config[key]) for key in args.panels), []).append(run)
        for title, runs in sorted(groups.items()):
            print(f"{title}:")
            panels[title] = curves_of(runs, args)
        save_panels(args.out, panels, x_label, y_label)
    else:
        curves, names = curves_of(args.runs, args)
        save_plot(args.out, curves, x_label, y_label, names)
    print(args.out)


if __name__ == "__main__":
    run_main(main)
