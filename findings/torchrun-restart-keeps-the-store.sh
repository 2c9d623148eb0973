#!/usr/bin/env bash
# torch 2.13.0: after a restart by `torchrun --standalone --max-restarts`, the store that the ranks meet in is the one of
# the attempt before, with all its keys. A comment beside the code says that each attempt gets a store of its own. gloo
# keeps the ranks' addresses there under the same keys, so a new rank can read the address of one that is gone, and then
# waits for it until its time limit ("Gloo connectFullMesh failed ... Connection refused"); the slower the machine, the
# likelier. A PrefixStore with TORCHELASTIC_RESTART_COUNT in its prefix keeps the attempts apart.
# Source: torch/distributed/rendezvous.py, _create_c10d_store ("We create a new TCPStore for every retry").
# Seen on 2026-11-28: both ranks of attempt 1 find the key that attempt 0 set.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > worker.py <<'PYTHON'
import os

import torch.distributed as dist

dist.init_process_group("gloo")
store = dist.distributed_c10d._get_default_store()
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
print("attempt", attempt, "finds the key:", store.check(["mark"]), flush=True)
dist.barrier()
if attempt == "0":
    store.set("mark", "1")
    dist.barrier()
    raise SystemExit(3)
PYTHON
venv/bin/python -m torch.distributed.run --standalone --nproc-per-node=2 --max-restarts=1 worker.py 2>&1 | tee log
test "$(grep -c 'attempt 0 finds the key: False' log)" = 2
test "$(grep -c 'attempt 1 finds the key: True' log)" = 2
echo "as described"
