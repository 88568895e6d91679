"""`scone check-config`: everything that could stop `scone serve`, without loading the weights."""

from __future__ import annotations

from scone.server.api.http_server import listen
from scone.server.serve_settings import SERVE_SETTINGS, api_config, engine_config, model_name
from scone.server.settings import Command, Resolved, describe


def run(settings: Resolved) -> int:
    """Prints the settings and what they lead to; raises SconeError at the first that cannot work."""
    print(describe(SERVE_SETTINGS, settings), end="\n\n")
    config = api_config(settings)
    print(f"keys: {len(config.api_keys) or 'none, the server is open'}")
    listen(settings.host, settings.port).close()
    print(f"address: {settings.host}:{settings.port} is free")

    # Here, because torch takes seconds and the checks above should not.
    from scone.cache import FGramTable
    from scone.model_store.checkpoint import open_checkpoint
    from scone.server.model_device import model_device

    checkpoint = open_checkpoint(settings.model)
    device = model_device(settings.device)
    limits = engine_config(settings, checkpoint.config.max_position, on_cuda=device.type == "cuda")
    tokenizer = checkpoint.tokenizer()
    described = checkpoint.config
    print(f"model: {model_name(settings)}, {described.architecture}, {described.num_layers} layers")
    print(f"context: {limits.max_model_len} of the model's {described.max_position} tokens")
    print(f"chat template: {'none' if tokenizer.chat_template is None else 'yes'}")
    if settings.table is None:
        print("table: none")
    else:
        with FGramTable.open(settings.table) as table:
            table.check_model(checkpoint.model_hash, tokenizer.hash)
            print(f"table: {table.num_fgrams} f-grams of up to {table.max_n} tokens, for this model")
    print("ok")
    return 0


COMMAND = Command(
    name="check-config",
    help="Check everything that could stop `scone serve`, without loading the weights.",
    settings=SERVE_SETTINGS,
    run=run,
)
