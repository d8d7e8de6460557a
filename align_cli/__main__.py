"""`python -m align_cli`, which is also what `deepspeed --module align_cli dpo recipe=…` calls."""

from align_cli.cli import main

main()
