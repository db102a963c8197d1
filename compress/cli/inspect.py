"""`compress inspect`: what a checkpoint holds."""

import click

from compress.cli.output import print_json, print_pairs


@click.command("inspect")
@click.argument("model")
@click.option("--target", help="Say whether this loader takes MODEL: vllm, sglang or transformers.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.pass_context
def inspect_command(ctx: click.Context, model: str, target: str | None, as_json: bool) -> None:
    """Say what MODEL holds: architecture, bytes by part, quantization.  Reads no weights.

    With --target, the exit code is 1 when that loader does not take the checkpoint, or when it is
    not known whether it does.

    \b
    Examples:
      compress inspect smollm2-w4
      compress inspect smollm2 --json
      compress inspect smollm2-w4 --target vllm
    """
    from compress.core.source import resolve_model
    from compress.inspection import inspect_folder

    source = resolve_model(model)
    if target is not None:
        from compress.targets import check_source

        verdict = check_source(source, target)
        if as_json:
            print_json(verdict)
        else:
            loads = {True: "yes", False: "no", None: "not known"}[verdict["loads"]]
            answer = {f"{target} takes it": loads}
            answer |= {f"reason {n}": why for n, why in enumerate(verdict["reasons"], start=1)}
            if verdict["needs"]:
                answer["needs"] = ", ".join(verdict["needs"])
            print_pairs(str(source.folder), answer)
        ctx.exit(0 if verdict["loads"] else 1)
    result = inspect_folder(source.folder)
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
    if reason := result["loads_in"]:
        rows["loads in"] = reason
    scheme = result["quantization"]
    if scheme is None:
        rows["quantization"] = "none"
    else:
        rows["quantization"] = f"{scheme['quant_method']}, {scheme['format']}"
        for name, weights in scheme["groups"].items():
            size = weights.get("group_size") or "one scale a row"
            kind = "symmetric" if weights.get("symmetric") else "asymmetric"
            told = f"{weights.get('num_bits')} bits, {kind}, group size {size}"
            if weights.get("inputs"):
                told += f"; inputs rounded to {weights['inputs']}, one scale a token"
            rows[f"  {name}"] = told
        rows["  linears"] = (
            f"{scheme['quantized_linears']}, {scheme['quantized_weights']:,} weights, "
            f"{scheme['bits_per_weight']} bits each with scales"
        )
        rows["  left in float"] = ", ".join(scheme["ignore"]) or "nothing"
        if cache := scheme["kv_cache"]:
            kind = "fp8" if cache.get("type") == "float" else "int8"
            how = "scaled at run time" if cache.get("dynamic") else "calibrated scales"
            rows["  keys and values"] = f"{kind}, {how}"
    print_pairs(result["folder"], rows)
