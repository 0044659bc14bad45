"""Run the whole pipeline of a configuration in containers, through KFP's DockerRunner, as the strictest pod would run it.

Called by prove.sh: `python images/prove_pipeline.py CONFIG IMAGE FOLDER UID`. FOLDER gets the outputs and the MLflow store.
"""

import re
import sys
from pathlib import Path

from kfp import components, local

from components import STEPS
from dfpo_core.config import load_config
from pipelines.dfpo_pipeline import compile_pipeline


def main(config_path: str, image: str, folder: str, uid: str) -> None:
    compiled = Path(folder) / "pipeline.yaml"
    compile_pipeline(load_config(config_path, [f"home={folder}/home"]), compiled)
    # The images are pipeline parameters, which a KFP server fills in, but its DockerRunner does not.
    text, count = re.subn(r"(?m)^( +image: ).*pipelinechannel--(?:gpu_)?image.*$", rf"\g<1>{image}", compiled.read_text(encoding="utf-8"))
    assert count == len(STEPS), f"{count} of {len(STEPS)} images replaced"
    compiled.write_text(text, encoding="utf-8")
    runner = local.DockerRunner(
        user=f"{uid}:{uid}",
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        read_only=True,
        tmpfs={"/tmp": ""},
        network_mode="none",
    )
    local.init(runner, pipeline_root=folder)  # mounted into every container
    components.load_component_from_file(str(compiled))()


if __name__ == "__main__":
    main(*sys.argv[1:])
