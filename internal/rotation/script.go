package rotation

// The scripts that run on the machines. They are plain POSIX sh with coreutils,
// openssl and, where clients are led to a neighbour, iptables. RUN is the
// private folder of this rotation on the machine:
//
//	RUN/old/…  RUN/trusted/…  RUN/switched/…  RUN/retired/…    trees of files by stage
//	RUN/keys/…                                                 new keys, made here
//	RUN/holder                                                 the runner that may change things
//
// Invariant: no script prints a secret, and none has one among its arguments.

// baseDir is the folder of all rotations on a machine.
const baseDir = "/var/lib/keyfleet/rotate-certs"

// fence begins every script that changes something: a runner that lost the lock
// to another must not go on. $1 is RUN, $2 the token of the runner.
const fence = `
RUN=$1; TOKEN=$2; shift 2
` + fenced

// fenceInput is fence for scripts that finish: the runner that waits for one may
// be another than began it, so what differs between them comes on standard
// input. It is the token and the neighbour, "-" for none.
const fenceInput = `
RUN=$1; shift; read -r TOKEN neighbour
` + fenced

const fenced = `
if [ "$(cat "$RUN/holder" 2>/dev/null)" != "$TOKEN" ]; then
  echo "another runner has taken over this rotation" >&2; exit 75
fi
touch "$RUN/holder"
`

// fencedStatus is the exit status of a script that met the fence.
const fencedStatus = 75

// lookScript describes files: one line each, of fields parted by "|": path,
// type (f, l, - for absent), mode, owner, target of a link, time of change, hash, and the content in
// base64 where it is no secret. $1 is how to show it.
const lookScript = `
for arg; do
  how=${arg%%:*}; p=${arg#*:}
  if [ ! -e "$p" ] && [ ! -L "$p" ]; then echo "$p|-|||||||"; continue; fi
  type=f; link=
  if [ -L "$p" ]; then type=l; link=$(readlink "$p"); fi
  meta=$(stat -L -c '%a|%u:%g' "$p"); changed=$(stat -c %Z "$p"); sum=$(sha256sum <"$p" | cut -d' ' -f1)
  case $how in
  plain) content=$(base64 -w0 <"$p") ;;
  cert) content=$(openssl x509 -in "$p" | base64 -w0) ;;
  config) content=$(sed 's/\("\{0,1\}\(client-key-data\|token\|password\)"\{0,1\}\) *: *"\{0,1\}[^",} ]*"\{0,1\}/\1: ""/g' "$p" | base64 -w0) ;; # YAML or JSON
  *) content= ;;
  esac
  echo "$p|$type|$meta|$link|$changed|$sum|$content|"
done
`

// factsScript tells what a machine has: key=value lines.
const factsScript = `
echo "now=$(date +%s)"
echo "forward=$(cat /proc/sys/net/ipv4/ip_forward 2>/dev/null || echo 0)"
for tool in openssl iptables curl systemctl sha256sum base64 tar; do
  if command -v $tool >/dev/null 2>&1; then echo "tool=$tool"; fi
done
echo "free=$(df -Pk /var /etc | awk 'NR>1{print $4}' | sort -n | head -1)"
echo "addresses=$(hostname -I 2>/dev/null)"
for d in "$1"/*/; do
  if [ -d "$d/old" ] && [ -e "$d/journal" ]; then echo "run=$(basename "$d")"; fi
done
`

// startedScript prints "yes" if the process named $1 began after the last change
// of every file that follows, "no" if not, and "absent" if there is none. Both
// times are good to a hundredth of a second.
const startedScript = `
name=$1; shift; files=$*; start=
for p in /proc/[0-9]*; do
  [ "$(basename "$(readlink "$p/exe" 2>/dev/null)" 2>/dev/null)" = "$name" ] || continue
  stat=$(sed 's/^.*) //' "$p/stat" 2>/dev/null) || continue
  set -- $stat # from the third field of proc(5) on; the start is the 22nd
  start=$(echo "$(date +%s.%N) $(cut -d' ' -f1 /proc/uptime) ${20} $(getconf CLK_TCK)" | awk '{printf "%.2f", $1 - $2 + $3 / $4}')
  break
done
[ -n "$start" ] || { echo absent; exit 0; }
for f in $files; do
  [ -e "$f" ] || [ -L "$f" ] || continue
  late=$(echo "$(stat -c %.2Z "$f") $start" | awk '{print ($1 > $2 + 0.05) ? "late" : ""}')
  [ -z "$late" ] || { echo no; exit 0; }
done
echo yes
`

// backupScript copies files into the tree of what was. What is there already
// stays: a second run must not take new files for old ones.
const backupScript = fence + `
mkdir -p "$RUN/old"
for p; do
  to=$RUN/old$p
  [ ! -e "$to" ] && [ ! -L "$to" ] || continue
  mkdir -p "$(dirname "$to")"
  if [ -e "$p" ] || [ -L "$p" ]; then cp -a "$p" "$to.part"; mv -T "$to.part" "$to"; fi
  if [ -L "$p" ]; then # what a link leads to belongs to it
    target=$(readlink -f "$p"); mkdir -p "$(dirname "$RUN/old$target")"; cp -a "$target" "$RUN/old$target"
  fi
done
sync -f "$RUN"
`

// keysScript makes a private key for each argument, KIND:NAME, and prints the
// name and the public key in base64. Keys that are there stay.
const keysScript = fence + `
mkdir -p "$RUN/keys"
for arg; do
  kind=${arg%%:*}; name=${arg#*:}; f=$RUN/keys/$name
  if [ ! -s "$f" ]; then
    mkdir -p "$(dirname "$f")"
    case $kind in
    RSA-*) openssl genpkey -quiet -algorithm RSA -pkeyopt rsa_keygen_bits:"${kind#RSA-}" -out "$f.part" 2>/dev/null || openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:"${kind#RSA-}" -out "$f.part" 2>/dev/null ;;
    *) openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:"$kind" -out "$f.part" ;;
    esac
    sync "$f.part"; mv -T "$f.part" "$f"
  fi
  printf '%s|%s\n' "$name" "$(openssl pkey -in "$f" -pubout | base64 -w0)"
done
`

// stageScript unpacks the trees that come as a tar on standard input, and puts
// the keys made here into them. Each argument is VERB:STAGE:PATH:KEY: "key" makes the
// file out of the key, "append" adds the key to the certificates that are there,
// "config" writes it into a kubeconfig, "self-DAYS" signs the old certificate anew with it. Owner and mode are those of the file that
// it will replace, or of REF where there was none.
const stageScript = fence + `
rm -rf "$RUN/trusted" "$RUN/switched" "$RUN/retired"
mkdir -p "$RUN/trusted" "$RUN/switched" "$RUN/retired"
tar -x -C "$RUN" --no-same-owner
for arg; do
  verb=${arg%%:*}; rest=${arg#*:}; stage=${rest%%:*}; rest=${rest#*:}; p=${rest%%:*}; key=$RUN/keys/${rest#*:}
  to=$RUN/$stage$p; mkdir -p "$(dirname "$to")"
  case $verb in
  key) cp "$key" "$to" ;;
  append) cat "$key" >>"$to" ;;
  self-*) openssl x509 -in "$RUN/old$p" -signkey "$key" -days "${verb#self-}" -set_serial "0x1$(openssl rand -hex 15)" -out "$to" 2>/dev/null ;;
  config) # the key comes to awk in a file: arguments and environment can be seen
    base64 -w0 <"$key" >"$to.key"; echo | cat >>"$to.key"
    awk 'NR == FNR {k = $0; next} {if ($1 == "client-key-data:") sub(/client-key-data:.*/, "client-key-data: " k); print}' "$to.key" "$to" >"$to.part"
    mv -T "$to.part" "$to"; shred -n 1 -u "$to.key" ;;
  esac
done
for stage in trusted switched retired; do
  (cd "$RUN/$stage" && find . -type f) | sed 's/^\.//' | while read -r p; do
    ref=$RUN/old$p
    if [ -L "$ref" ]; then ref=$(readlink -f "$p"); fi
    if [ -e "$ref" ]; then chown --reference="$ref" "$RUN/$stage$p"; chmod --reference="$ref" "$RUN/$stage$p"
    else chown 0:0 "$RUN/$stage$p"; chmod 600 "$RUN/$stage$p"; fi
  done
done
sync -f "$RUN"
`

// placeScript puts files where they belong. Each argument is STAGE:PATH; stage
// "absent" removes. A certificate and its key, given one after the other, change
// within a moment. A file that is as it should be is not touched.
const placeScript = fence + `
for arg; do
  stage=${arg%%:*}; p=${arg#*:}; from=$RUN/$stage$p; new=$p.keyfleet-new
  rm -f "$new"
  if [ "$stage" = absent ] || { [ ! -e "$from" ] && [ ! -L "$from" ]; }; then continue; fi
  if [ -L "$from" ]; then
    [ "$(readlink "$p" 2>/dev/null)" != "$(readlink "$from")" ] || continue
    cp -a "$from" "$new"
  else
    cmp -s "$from" "$p" && [ ! -L "$p" ] && continue
    cp -a "$from" "$new"; touch "$new"; sync "$new"
  fi
done
for arg; do
  stage=${arg%%:*}; p=${arg#*:}; from=$RUN/$stage$p; new=$p.keyfleet-new
  if [ "$stage" = absent ]; then rm -f "$p"; continue; fi
  if [ -e "$new" ] || [ -L "$new" ]; then mv -fT "$new" "$p"; echo "placed $p ($stage)"; fi
done
for arg; do sync -f "$(dirname "${arg#*:}")"; done
`

// placedScript prints "yes" if every STAGE:PATH is in place.
const placedScript = `
RUN=$1; shift
for arg; do
  stage=${arg%%:*}; p=${arg#*:}; from=$RUN/$stage$p
  if [ "$stage" = absent ]; then
    [ ! -e "$p" ] && [ ! -L "$p" ] && continue
    echo "no $p"; exit 0
  fi
  if [ -L "$from" ]; then [ "$(readlink "$p" 2>/dev/null)" = "$(readlink "$from")" ] && continue
  elif cmp -s "$from" "$p" && [ "$(stat -c '%a %u %g' "$from")" = "$(stat -c '%a %u %g' "$p")" ]; then continue; fi
  echo "no $p"; exit 0
done
echo yes
`

// podScript is what scripts about static pods share: the process of a program, and
// putting a manifest in place.
const podScript = `
pid_of() {
  for p in /proc/[0-9]*; do
    if [ "$(basename "$(readlink "$p/exe" 2>/dev/null)" 2>/dev/null)" = "$1" ]; then echo "${p#/proc/}"; return; fi
  done
}
place() { # stage, path
  cp -a "$RUN/$1$2" "$RUN/manifest.part"; touch "$RUN/manifest.part"; sync "$RUN/manifest.part"
  beside=$(dirname "$(dirname "$2")")/.keyfleet-manifest # not inside: the kubelet reads all there is
  cp -a "$RUN/manifest.part" "$beside"; mv -fT "$beside" "$2"; rm -f "$RUN/manifest.part"
}
`

// restartScript restarts programs of a master with nobody noticing who can choose
// another API server. $1 is our address, $2 the API's port, $3 and $4 a client
// certificate and its key. What follows is NAME:STAGE:MANIFEST of a static pod, or
// NAME:unit:UNIT.
//
// New connections to our API server are led to the neighbour's by the packet
// filter; then our server is stopped, and finishes what it has begun; then etcd
// restarts, if it must; then our server starts again. The others restart meanwhile.
const restartScript = fenceInput + podScript + `
us=$1; port=$2; cert=$3; key=$4; shift 4
rules() { # A or D
  iptables -w -t nat -$1 PREROUTING -d "$us" -p tcp --dport "$port" -m comment --comment keyfleet-rotate -j DNAT --to-destination "$neighbour:$port" &&
  iptables -w -t nat -$1 POSTROUTING -d "$neighbour" -p tcp --dport "$port" -m conntrack --ctstate DNAT -m comment --comment keyfleet-rotate -j MASQUERADE &&
  iptables -w -$1 FORWARD -d "$neighbour" -p tcp --dport "$port" -m conntrack --ctstate DNAT -m comment --comment keyfleet-rotate -j ACCEPT &&
  iptables -w -$1 FORWARD -s "$neighbour" -p tcp --sport "$port" -m comment --comment keyfleet-rotate -j ACCEPT
}
undrain() { while rules D 2>/dev/null; do :; done; }
drain() { [ "$neighbour" = - ] && return; undrain; rules A; sleep 2; }
[ "$neighbour" = - ] || trap undrain EXIT
answers() { # the API server says that it is ready, also where it answers no stranger
  for host in 127.0.0.1 "$us"; do
    if [ "$(curl -sk --max-time 3 --cert "$cert" --key "$key" "https://$host:$port/readyz" 2>/dev/null)" = ok ]; then return 0; fi
  done
  return 1
}
wait_gone() { # pid, seconds
  i=0; while [ -d "/proc/$1" ] && [ $i -lt "$2" ]; do sleep 0.2; i=$((i+1)); done
}
wait_new() { # name, old pid
  i=0
  while :; do
    now=$(pid_of "$1")
    if [ -n "$now" ] && [ "$now" != "$2" ]; then echo "$1 restarted: process $2 -> $now"; return; fi
    i=$((i+1)); [ $i -lt 600 ] || { echo "$1 did not come back" >&2; exit 1; }
    sleep 0.2
  done
}
# An API server that ends waits for its watches, which do not end, until the kubelet
# kills it after half a minute. Once it accepts nobody any more, half of that is
# enough for what it has begun.
hurry() { # pid of the API server
  i=0; closed=0
  while [ -n "$1" ] && [ -d "/proc/$1" ] && [ $i -lt 60 ]; do
    status=0; curl -sk --max-time 2 -o /dev/null "https://127.0.0.1:$port/livez" || status=$?
    if [ $status = 7 ]; then closed=$((closed+1)); fi
    if [ $closed -gt 15 ]; then kill -9 "$1" 2>/dev/null || true; break; fi
    sleep 1; i=$((i+1))
  done
}
begin() { # NAME:STAGE:MANIFEST, or NAME:unit:UNIT
  what=${1#*:}; stage=${what%%:*}; path=${what#*:}; running=
  if [ "$stage" = unit ]; then systemctl restart "$path"; return; fi
  # Of a manifest that is there already the kubelet takes no notice; it does of a process that ends.
  if cmp -s "$RUN/$stage$path" "$path"; then running=$(pid_of "${1%%:*}"); fi
  place "$stage" "$path"
  [ -z "$running" ] || kill "$running" 2>/dev/null || true
}
restart() { # as begin
  name=${1%%:*}; old=$(pid_of "$name")
  begin "$1"
  if [ "$name" = kube-apiserver ]; then hurry "$old"; fi
  wait_new "$name" "$old"
}
api=; etcd=; others=
for arg; do
  case $arg in kube-apiserver:*) api=$arg ;; etcd:*) etcd=$arg ;; *) others="$others $arg" ;; esac
done
olds=
for arg in $others; do
  name=${arg%%:*}
  olds="$olds $name:$(pid_of "$name")"
  begin "$arg"
done
if [ -n "$api" ]; then drain; fi
if [ -n "$etcd" ]; then
  if [ -n "$api" ]; then # which is away while etcd restarts
    old=$(pid_of kube-apiserver)
    rest=${api#*:}; rm -f "${rest#*:}"
    hurry "$old"
    [ -z "$old" ] || wait_gone "$old" 400
  fi
  restart "$etcd"
fi
if [ -n "$api" ]; then
  restart "$api"
  i=0; until answers; do i=$((i+1)); [ $i -lt 300 ] || { echo "the API server is not ready" >&2; exit 1; }; sleep 0.4; done
fi
for pair in $olds; do wait_new "${pair%%:*}" "${pair#*:}"; done
`

// unitScript restarts a unit.
const unitScript = fenceInput + `
systemctl restart "$1"
`

// auditScript tells who was seen last with which certificate, at the end of an
// audit log: HASH|USER|TIME. The order of fields is that of the API server.
const auditScript = `
[ -r "$1" ] || exit 0
tail -c 33554432 "$1" | grep -F X509SHA256= |
sed -n 's/.*"user":{"username":"\([^"|]*\)".*X509SHA256=\([0-9a-f]*\).*"requestReceivedTimestamp":"\([^"]*\)".*/\2|\1|\3/p' |
awk -F'|' '{last[$1 "|" $2] = $3} END {for (k in last) print k "|" last[k]}'
`

// afreshScript stops the kubelet and all that it and systemd run of a control plane,
// and starts it from new manifests. Arguments are those of restartScript.
//
// A kubelet that is running could wait for ever: one that has just started, and whose
// static pod changes before it has seen the end of the old one, does not start the new.
const afreshScript = fenceInput + podScript + `
shift 4
for arg; do case $arg in kubelet:*) systemctl stop "${arg##*:}" ;; esac; done
end() { # NAME
  for signal in TERM KILL; do
    i=0
    while pid=$(pid_of "$1"); [ -n "$pid" ] && [ $i -lt 150 ]; do
      [ $i -gt 0 ] || kill -$signal "$pid" 2>/dev/null || true
      sleep 0.2; i=$((i+1))
    done
  done
}
for arg; do
  name=${arg%%:*}; rest=${arg#*:}
  case $arg in
  kubelet:*) ;;
  *:unit:*) systemctl stop "${arg##*:}" ;;
  *)
    end "$name"; to=${rest#*:}
    place "${rest%%:*}" "$to"
    echo "$name stopped, $to placed" ;;
  esac
done
for arg; do case $arg in *:unit:*) systemctl start --no-block "${arg##*:}" ;; esac; done
`

// lockScript takes the lock of a machine for a run: $1 RUN, $2 our token, $3
// whether to take it over ("yes", "no"), $4 who we are. It prints who holds it if
// that is another and does so now: the holder touches its file with every step.
const lockScript = `
RUN=$1; TOKEN=$2; TAKE=$3; WHO=$4
mkdir -p "$(dirname "$RUN")"; chmod 700 "$(dirname "$RUN")"
for other in "$(dirname "$RUN")"/*/holder; do
  [ -e "$other" ] || continue
  [ "$(cat "$other")" != "$TOKEN" ] || continue
  # Our own former runner is dead: it held the lock of the local journal, which we hold now.
  [ "$(cat "$(dirname "$other")/who" 2>/dev/null)" != "$WHO" ] || continue
  if [ "$TAKE" = no ] && [ $(( $(date +%s) - $(stat -c %Y "$other") )) -lt 90 ]; then
    echo "held $(cat "$(dirname "$other")/who" 2>/dev/null)"; exit 0
  fi
done
mkdir -p "$RUN"; chmod 700 "$RUN"
printf '%s' "$WHO" | cat >"$RUN/who" # the shell's own message about a full disk is "I/O error"
printf '%s' "$TOKEN" | cat >"$RUN/holder.part"; mv -f "$RUN/holder.part" "$RUN/holder"
for other in "$(dirname "$RUN")"/*/holder; do # who held the lock for another run meets the fence, too
  [ "$other" = "$RUN/holder" ] || rm -f "$other"
done
echo taken
`

// releaseScript gives the lock back, if it is still ours.
const releaseScript = `
if [ "$(cat "$1/holder" 2>/dev/null)" = "$2" ]; then rm -f "$1/holder" "$1/who"; fi
`

// cleanScript removes what holds keys, when a rotation is over, and gives the lock back.
const cleanScript = fence + `
find "$RUN" -type f \( -name '*.key' -o -name '*.conf' -o -name '*.pem' -o -path '*/keys/*' \) -exec shred -n 1 -u {} + 2>/dev/null || true
rm -f "$RUN"/*.age
rm -rf "$RUN/keys" "$RUN/trusted" "$RUN/switched" "$RUN/retired" "$RUN/old"
rm -f "$RUN/holder" "$RUN/who"
`
