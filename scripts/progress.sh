#!/usr/bin/env bash
# Turn pip's pages of output into one moving line on a terminal, a few lines in a log. Reads standard input.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
count=0
while IFS= read -r line; do
  echo "$line" >>"$log"
  case $line in
    Collecting\ * | Processing\ *)
      count=$((count + 1))
      name=${line#* }
      if [ -t 2 ]; then
        printf '\r\033[K    %d fetched: %s' "$count" "${name%% *}" >&2
      elif [ $((count % 50)) = 0 ]; then
        echo "    $count fetched" >&2
      fi
      ;;
    Installing\ collected*)
      [ -t 2 ] && printf '\r\033[K' >&2
      echo "    $count fetched, unpacking (about a minute)" >&2
      ;;
    ERROR*) cat "$log" >&2 && failed=1 && cat >&2 ;;
  esac
done
exit ${failed:-0}
