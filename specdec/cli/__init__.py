"""The command line, one file per subcommand. Commands import torch only when they run."""
