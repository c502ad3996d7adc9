"""What conditions, null models and the columns of a perturbation's table are called, wherever people read them."""

STREAMS = {"shuffled": "token_shuffled"}  # a data.condition -> what analyze.py and the null model call the same stream

NAMES = {
    "original": "original text",
    "token_shuffled": "shuffled tokens",
    "shuffled_keep_last": "shuffled, last token kept",
    "untrained": "untrained model",
    "without_massive": "without massive units",
    "floor": "permuted pairs (floor)",
    "per_sequence": "per sequence, mean",
    "layer_shuffle": "layer shuffle (paper)",
    "layer_shuffle_regradient": "layer shuffle, new gradient",
    "increment_shuffle_windowed": "steps shuffled in windows",
    "increment_shuffle": "steps shuffled",
    "sign_flip": "steps' signs flipped",
    "iaaft": "steps, same spectrum (IAAFT)",
}

COLUMNS = {
    "plane_mse": "MSE, plane",
    "relative_put": "rel. put",
    "relative": "rel. end",
    "cosine_put": "cos put",
    "cosine": "cos end",
    "kl": "KL, nats",
    "nearer": "nearer",
    "contraction": "contraction",
}


def stream_name(condition: str) -> str:
    """The one name of a stream, by which runs of different scripts stand beside each other."""
    return STREAMS.get(condition, condition)
