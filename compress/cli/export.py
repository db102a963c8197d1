"""`compress export`: the same codes in another checkpoint format."""

from pathlib import Path

import click

from compress.cli.output import print_json, print_pairs


@click.command("export")
@click.argument("model")
@click.option("--format", "format_name", required=True, help="compressed-tensors, gptq or awq.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Output folder.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def export_command(model: str, format_name: str, out: Path, overwrite: bool, as_json: bool) -> None:
    """Re-pack the quantized MODEL in another format.  Codes stay as they are.

    MODEL is a checkpoint in one of the formats (a folder or a Hugging Face id), or a .gguf file
    whose linears are Q4_0 or Q8_0.

    \b
    Examples:
      compress export model-gptq --format compressed-tensors --out model-w4
      compress export model-Q4_0.gguf --format awq --out model-awq
    """
    from compress.export import export_model

    report = export_model(model, format_name, out, overwrite)
    if as_json:
        print_json(report)
        return
    sizes, scales = report["sizes"], report["scales"]
    changed = f"{scales['rounded']:,} changed, by {scales['largest_relative_change']:.1e} at most"
    rows = {
        "output": report["out"],
        "format": f"{report['format']}, from {report['from']}",
        "linears": f"{len(report['layers'])}, {sizes['quantized_weights']:,} weights",
        "scales": changed if scales["rounded"] else "equal",
        "size": f"{sizes['bytes'] / 1e6:,.1f} MB, was {sizes['original_bytes'] / 1e6:,.1f} MB",
        "left in float, in blocks": ", ".join(report["left_in_float"]) or "nothing",
    }
    print_pairs("Result", rows)
