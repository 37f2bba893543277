# The guest's part of scripts/demo; scripts/demo_run.py reads the lines that begin with DEMO.
host=172.31.77.1
fact() { echo "DEMO $*"; }
digest() { sha256sum | cut -d ' ' -f 1; }

fact uname "$(uname -srvm)"
fact cpus "$(nproc)"
mount -t ext4 /dev/vda /mnt && echo "written in the guest" >/mnt/demo && umount /mnt
ping -c 1 -W 5 $host >/dev/null && fact ping ok

head -c 4194304 /dev/urandom >/tmp/up
fact up "$(digest </tmp/up)"
nc $host 5001 </tmp/up >/dev/null

nc -l -p 5003 </dev/null >/tmp/down &
until grep -q ':138B .* 0A ' /proc/net/tcp /proc/net/tcp6; do usleep 10000; done
fact listening 5003
wait $!
fact down "$(digest </tmp/down)"
