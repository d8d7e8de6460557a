"""`align`: one YAML recipe becomes one finished stage of an alignment pipeline."""
