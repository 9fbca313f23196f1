# On Colab: installs JAX for this runtime, and deq_jax.  Elsewhere: does nothing.
import importlib.util
import os
import subprocess
import sys

REPOSITORY = "URL"  # the address of the repository of deq_jax

if "google.colab" in sys.modules:
    if os.path.exists("/dev/nvidia0"):
        backend, package = "gpu", "jax[cuda12]"
    elif os.path.exists("/dev/accel0") or "TPU_ACCELERATOR_TYPE" in os.environ:
        backend, package = "tpu", "jax[tpu]"
    else:
        backend, package = "cpu", "jax"
    if importlib.util.find_spec("deq_jax") is None:
        # One call for both: JAX must not become newer than its plugin for the chip.
        packages = [package, f"deq_jax[train,plot,hub] @ git+{REPOSITORY}", "scikit-learn"]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", *packages]
        subprocess.run(pip, check=True)
    import jax

    assert jax.default_backend() == backend, (
        f"JAX uses the {jax.default_backend()} of a runtime with a {backend}: choose "
        "Runtime > Restart session, then run all cells again"
    )
