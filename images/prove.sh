#!/usr/bin/env bash
# Builds both images on this machine and proves what images/README.md says of them. Needs a Docker engine with BuildKit, git, and a
# Python with `pip install '.[demo]'` and docker's client for the pipeline run. Prints a Markdown record; the engine's output goes to
# a log. Nothing is kept but the images.
#
#   images/prove.sh [BASE [WHEELS]]
#
# BASE    a Debian or Ubuntu image with python3, its venv module, headers and a C++ compiler, for both images; default: theirs.
#         Without CUDA in it the GPU image is built with a CPU wheel of torch and DeepSpeed's CPU operation.
# WHEELS  a folder of wheels to install from instead of an index: `pip download` of the lock files and torch. Default: pip's index.
# PYTHON  the interpreter of the pipeline run; default: .venv/bin/python
set -euo pipefail
cd "$(dirname "$0")/.."
base="${1:-}" wheels="${2:-}" python="${PYTHON:-.venv/bin/python}"
python="$(realpath -s "$python")"
export DOCKER_BUILDKIT=1

work="$(mktemp -d)"
log="$work/log"
uid=$((20000 + RANDOM)) # an id that no image knows
clean_up() {
  # What the containers wrote belongs to their uid.
  [ -d "$work/run" ] && docker run --rm --network none --user "$uid" -v "$work/run:/run" dfpo-cpu:proof sh -c 'rm -rf /run/*' 2> /dev/null || true
  rm -rf "$work/context" "$work/run"
}
trap clean_up EXIT
trap 'echo "FAILED at line $LINENO; the output is in $log" >&2' ERR

fail() { echo "FAILED: $1" >&2; exit 1; }
strict() { docker run --rm --user "$uid:$uid" --cap-drop ALL --security-opt no-new-privileges --read-only --tmpfs /tmp --network none "$@"; }

# What a clone has, with the changes that are being tried.
mkdir "$work/context"
git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -T - -c 2> /dev/null | tar -x -C "$work/context"
arguments=()
[ -z "$base" ] || arguments+=(--build-arg "BASE=$base")
if [ -n "$wheels" ]; then
  cp -rL "$wheels" "$work/context/images/wheels"
  arguments+=(--build-arg PIP_NO_INDEX=1)
fi
version="$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" commit="$(git rev-parse HEAD)"

build() { # KIND
  local kind="$1" extra=()
  if [ "$kind" = gpu ] && [ -n "$base" ] && ! docker run --rm --network none "$base" sh -c 'command -v nvcc' > /dev/null; then
    extra=(--build-arg DS_ACCELERATOR=cpu --build-arg DEEPSPEED_OPS=DS_BUILD_SHM_COMM=1)
  fi
  docker build --network host -f "$work/context/images/$kind/Dockerfile" -t "dfpo-$kind:proof" --build-arg "VERSION=$version" \
    --build-arg "COMMIT=$commit" "${arguments[@]}" "${extra[@]}" "$work/context" >> "$log" 2>&1
}
layers() { docker image inspect --format '{{range .RootFS.Layers}}{{println .}}{{end}}' "dfpo-$1:proof" | sed '/^$/d'; }
label() { docker image inspect --format "{{index .Config.Labels \"org.opencontainers.image.$2\"}}" "dfpo-$1:proof"; }

echo "Docker $(docker version --format '{{.Server.Version}}'), $(uname -m), commit ${commit:0:10}"
for kind in cpu gpu; do
  echo
  echo "### dfpo-$kind"
  echo
  started=$SECONDS
  build "$kind"
  echo "- built in $((SECONDS - started)) s, $(($(docker image inspect --format '{{.Size}}' "dfpo-$kind:proof") / 1000000)) MB"

  layers "$kind" > "$work/before"
  echo "# a change of the source" >> "$work/context/dfpo_core/__init__.py"
  started=$SECONDS
  build "$kind"
  seconds=$((SECONDS - started))
  layers "$kind" > "$work/after"
  changed="$(comm -13 <(sort "$work/before") <(sort "$work/after") | wc -l)"
  [ "$changed" -eq 1 ] || [ "$changed" -eq 2 ] || fail "a change of the source rebuilt $changed layers"
  echo "- rebuilt after a change of the source in $seconds s: $changed of $(wc -l < "$work/after") layers are new"

  [ "$(label "$kind" version)" = "$version" ] && [ "$(label "$kind" revision)" = "$commit" ] || fail "the labels are wrong"
  echo "- labels: version $version, revision ${commit:0:10}"
  user="$(docker image inspect --format '{{.Config.User}}' "dfpo-$kind:proof")"
  [ "$user" = 10001:10001 ] || fail "runs as $user"
  echo "- runs as $user"

  # The build leaves behind no wheels, no pip configuration, and the certificates of its base.
  # shellcheck disable=SC2016
  strict "dfpo-$kind:proof" sh -c '[ -z "$(find /images /source /etc/pip.conf -type f 2> /dev/null)" ]' || fail "the build left files behind"
  authorities() { docker run --rm --network none --user "$uid" "$1" sh -c 'find /etc/ssl /usr/share/ca-certificates /usr/local/share/ca-certificates -type f -exec sha256sum {} + 2> /dev/null | sort'; }
  if [ -n "$base" ]; then
    diff <(authorities "$base") <(authorities "dfpo-$kind:proof") > /dev/null || fail "the certificates differ from the base's"
    echo "- certificates are the base's; no wheels, pip configuration or build folders left behind"
  fi

  echo "- \`dfpo doctor\` as uid $uid, no capabilities, no new privileges, read-only, /tmp alone writable, no network:"
  echo
  strict "dfpo-$kind:proof" dfpo doctor 2>> "$log" | sed 's/^/      /'
done
operations="from deepspeed.git_version_info import installed_ops as built; from deepspeed.ops.op_builder.all_ops import ALL_OPS
print(', '.join(name for name in built if built[name] and ALL_OPS[name].load()))"
echo
echo "- DeepSpeed's operations that load, with no cache to build them in: $(strict dfpo-gpu:proof python3 -c "$operations" 2>> "$log" | tail -1)"

echo
echo "### scratch:tiny through KFP's DockerRunner"
echo
mkdir -m 777 "$work/run"
started=$SECONDS
PYTHONPATH="$PWD" "$python" images/prove_pipeline.py pipelines/configs/tiny.yaml dfpo-cpu:proof "$work/run" "$uid" >> "$log" 2>&1
echo "- every step in a container of its own as uid $uid, with the same restrictions: $((SECONDS - started)) s"
grep -aoE "Task .*'[a-z-]+'.* finished with status .*(SUCCESS|FAILURE)" "$log" | sed -E 's/\x1b\[[0-9;]*m//g; s/^/      /'
echo
PYTHONPATH="$PWD" "$python" -m pipelines.cli compare pipelines/configs/tiny.yaml --set "home=$work/run/home" 2>> "$log" | sed 's/^/      /'
rm -f "$work/before" "$work/after"
