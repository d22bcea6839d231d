"""run.sh of a Replicate workspace: verifies a component and says which one comes next.

POSIX shell with cat, sed, sha256sum and timeout. It knows digests only, so reading it tells
nothing of what a component must print. What it verified it remembers in `.done`, so that a call
costs the same at the first component and at the last; the judge trusts none of it.
"""

PROBES = (2, 7, 13)

_SCRIPT = """\
#!/bin/sh
# sh run.sh             says which component comes next
# sh run.sh K           verifies cK.sh
# sh run.sh --finished  succeeds when every component is verified
salt=@SALT@
count=@COUNT@
newline='
'
verified="$newline$(cat .done 2>/dev/null)$newline"

is_verified() {
  case $verified in *"$newline$1$newline"*) [ -e "c$1.sh" ] ;; *) false ;; esac
}

next() {
  n=1
  while [ "$n" -le "$count" ] && is_verified "$n"; do n=$((n + 1)); done
  if [ "$n" -gt "$count" ]; then echo "all done"; return 0; fi
  line=$(sed -n "${n}p" components.txt)
  echo "next ${line%;*}"
  return 1
}

matches() {
  [ -e "c$1.sh" ] || return 1
  outputs=
  for x in @PROBES@; do
    outputs="$outputs $(timeout 2 sh "c$1.sh" "$x" </dev/null 2>/dev/null)" || return 1
  done
  sum=$(printf '%s' "$salt $1$outputs" | sha256sum)
  line=$(sed -n "${1}p" components.txt)
  case $sum in "${line##*;}"*) ;; *) return 1 ;; esac
}

case ${1-} in
  "") next; exit 0 ;;
  --finished) next; exit $? ;;
  *[!0-9]* | 0* | ????*) echo "no component $1"; next; exit 1 ;;
esac
if [ "$1" -gt "$count" ]; then echo "no component $1"; next; exit 1; fi
if matches "$1"; then
  echo "ok $1"
  is_verified "$1" || echo "$1" >>.done
  verified="$verified$1$newline"
  next
  exit 0
fi
echo mismatch
if is_verified "$1"; then
  sed -i "/^$1\\$/d" .done
  verified="$newline$(cat .done)$newline"
fi
next
exit 1
"""


def run_script(salt: str, components: int) -> str:
    """The script for a task of `components` components whose digests carry `salt`."""
    probes = " ".join(map(str, PROBES))
    return (
        _SCRIPT.replace("@SALT@", salt)
        .replace("@COUNT@", str(components))
        .replace("@PROBES@", probes)
    )
