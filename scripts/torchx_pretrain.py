"""A TorchX component: `torchx run -s SCHEDULER scripts/torchx_pretrain.py:pretrain --recipe R
--data D --run RUN -j 2x8`.

TorchX reads the types and the docstring of the function; `mobilellm[launch]` brings it along.
"""

import os.path
import shlex

import torchx.specs as specs


def pretrain(
    recipe: str,
    data: str,
    run: str,
    j: str = "1x1",
    image: str = "mobilellm",
    flags: str = "",
    gpu: int = 0,
    cpu: int = 8,
    memMB: int = 65536,
    max_retries: int = 3,
) -> specs.AppDef:
    """Train a recipe on several nodes; started anew after a fault, it goes on where it stood.

    Args:
        recipe: a recipe (TOML)
        data: folder of prepared data, seen by all nodes
        run: run folder, seen by all nodes
        j: nodes x processes on each
        image: container image (or folder, for the local scheduler) with mobilellm in it
        flags: further flags of `mobilellm train`
        gpu: GPUs a node
        cpu: CPU cores a node
        memMB: main memory a node, MB
        max_retries: times that the whole job is started anew
    """
    nodes, processes = (int(part) for part in j.split("x"))
    address = "localhost:0" if nodes == 1 else f"$${{{specs.macros.rank0_env}}}:29500"
    launcher = {
        "--nnodes": nodes,
        "--nproc-per-node": processes,
        "--max-restarts": 3,
        "--rdzv-backend": "c10d",
        "--rdzv-id": specs.macros.app_id,
        "--rdzv-endpoint": address,
    }
    settings = [word for name, value in launcher.items() for word in (name, str(value))]
    train = ["train", recipe, "--data.path", data, "--out", run, "--resume", "auto"]
    command = ["-m", "torch.distributed.run", *settings, "-m", "mobilellm", *train]
    command += shlex.split(flags)
    name = os.path.basename(run.rstrip("/")) or "mobilellm"
    if nodes == 1:
        entrypoint, arguments = "python", command
    else:  # rank 0's address is in a variable whose name the scheduler knows
        words = ["python", *command]
        line = " ".join(word if word.startswith("$$") else shlex.quote(word) for word in words)
        entrypoint, arguments = "sh", ["-c", line]
    return specs.AppDef(
        name=name,
        roles=[
            specs.Role(
                name="pretrain",
                image=image,
                entrypoint=entrypoint,
                args=arguments,
                num_replicas=nodes,
                max_retries=max_retries,
                resource=specs.Resource(cpu=cpu, gpu=gpu, memMB=memMB),
                retry_policy=specs.RetryPolicy.APPLICATION,
            )
        ],
    )
