"""`skipstone train`, and `python -m skipstone.train` for launchers of several processes (torchrun, accelerate)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .config import parse
from .stop import Stopped

FAILED, REFUSED, STOPPED, INTERRUPTED = 1, 2, 75, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        An exit code: 0 done; 1 it failed; 2 what was given cannot be used; 75 stopped by a signal, saved, to be
        started again (BSD's EX_TEMPFAIL); 130 Ctrl-C before there was anything to save.
    """
    try:
        config, is_dry = parse(sys.argv[1:] if arguments is None else arguments)
        # imported late: help and usage errors come at once
        from .dry_run import dry_run
        from .run import train

        if is_dry:
            print(dry_run(config))
            return 0
        heads = train(config)
    except Stopped as stopped:
        return _say(f"{stopped.message}; the same command goes on", STOPPED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        return _say(str(error), REFUSED)
    except (RuntimeError, MemoryError) as error:
        return _say(str(error) or type(error).__name__, FAILED)
    if os.environ.get("RANK", "0") == "0":
        if heads.calibration is None:
            print("the heads are not calibrated, which needs the whole base on one device: skipstone calibrate does it")
        else:
            for layer, measured in heads.calibration.exits.items():
                print(f"exit {layer}: agreement {measured.agreement:.3f}, in top 4 {measured.top_k[3]:.3f}")
        print(f"heads in {os.path.join(config.out, 'heads')}")
    return 0


def _say(text: str, code: int) -> int:
    if code != STOPPED or os.environ.get("RANK", "0") == "0":
        print(f"skipstone: {text}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
