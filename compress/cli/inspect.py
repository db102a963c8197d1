"""`compress inspect`: what a checkpoint holds."""

import click

from compress.cli.output import print_json, print_pairs


@click.command("inspect")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def inspect_command(model: str, as_json: bool) -> None:
    """Say what MODEL holds: architecture, bytes by part, quantization.  Reads no weights.

    \b
    Examples:
      compress inspect smollm2-w4
      compress inspect smollm2 --json
    """
    from compress.core.source import resolve_model
    from compress.inspection import inspect_folder

    result = inspect_folder(resolve_model(model).folder)
    if as_json:
        print_json(result)
        return
    rows = {
        "architecture": f"{result['architecture']}, {result['layers']} layers, "
        f"hidden size {result['hidden_size']}",
        "size": f"{result['bytes'] / 1e6:,.1f} MB in {result['tensors']} tensors",
    }
    for part, size in result["bytes_by_part"].items():
        rows[f"  {part}"] = f"{size / 1e6:,.1f} MB ({size / result['bytes']:.0%})"
    rows["tied embeddings"] = "yes" if result["tied_embeddings"] else "no"
    scheme = result["quantization"]
    if scheme is None:
        rows["quantization"] = "none"
    else:
        rows["quantization"] = f"{scheme['quant_method']}, {scheme['format']}"
        for name, weights in scheme["groups"].items():
            size = weights.get("group_size") or "one scale a row"
            kind = "symmetric" if weights.get("symmetric") else "asymmetric"
            rows[f"  {name}"] = f"{weights.get('num_bits')} bits, {kind}, group size {size}"
        rows["  linears"] = (
            f"{scheme['quantized_linears']}, {scheme['quantized_weights']:,} weights, "
            f"{scheme['bits_per_weight']} bits each with scales"
        )
        rows["  left in float"] = ", ".join(scheme["ignore"]) or "nothing"
    print_pairs(result["folder"], rows)
