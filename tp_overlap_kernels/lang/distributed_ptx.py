"""The assembly behind the words of distributed.py that signal.py lacks: PTX of sm_90, one block a primitive.

Always system scope: these words are used on slots of other devices too, where a narrower one orders nothing.
"""

import triton.language as tl

# As signal's NOTIFY, but the slot is added to. $1 slot, $2 addend.
NOTIFY_ADD = tl.constexpr("""
{
    .reg .pred first;
    .reg .b32 tid;
    barrier.sync.aligned 0;
    mov.u32 tid, %tid.x;
    setp.eq.u32 first, tid, 0;
    @first red.release.sys.global.add.u64 [$1], $2;
    mov.u32 $0, 0;
}
""")

# Poll `count` words until each equals the wanted one, word i by thread i; then the barrier's reduction hands every
# thread the same status. Registers: $0 status; $1 first word, $2 count, $3 wanted, $4 world. The clock and the world's
# FAILED are looked at after 512 polls and then every 1024: a short wait pays for neither. Offsets: world.py.
_WAIT = """
{
    .reg .pred done, here, skip, gone, early, endless, any;
    .reg .b32 i, threads, status, polls, due;
    .reg .b64 word, now, started, limit, failed;
    .reg .b%(bits)s seen;
    mov.u32 status, 0;
    mov.u32 polls, 0;
    mov.u64 started, 0;
    mov.u32 i, %%tid.x;
    mov.u32 threads, %%ntid.x;
    next:
    setp.ge.s32 done, i, $2;
    @done bra join;
    mul.wide.s32 word, i, %(bytes)s;
    add.u64 word, word, $1;
    poll:
    ld.%(semantic)s.sys.global.b%(bits)s seen, [word];
    setp.eq.b%(bits)s here, seen, $3;
    @here bra arrived;
    add.u32 polls, polls, 1;
    and.b32 due, polls, 1023;
    setp.ne.u32 skip, due, 512;
    @skip bra poll;
    ld.relaxed.gpu.global.b64 failed, [$4 + 24];
    setp.ne.s64 gone, failed, 0;
    @gone bra expired;
    mov.u64 now, %%globaltimer;
    setp.eq.u64 early, started, 0;
    selp.u64 started, now, started, early;
    sub.u64 now, now, started;
    ld.relaxed.gpu.global.b64 limit, [$4 + 16];
    setp.le.u64 early, now, limit;
    setp.eq.u64 endless, limit, 0;
    or.pred early, early, endless;
    @early bra poll;
    atom.acq_rel.gpu.global.cas.b64 failed, [$4 + 24], 0, 1;
    setp.ne.s64 gone, failed, 0;
    @gone bra expired;
    st.relaxed.gpu.global.b64 [$4 + 32], word;
    st.relaxed.gpu.global.b%(bits)s [$4 + 40], $3;
    st.relaxed.gpu.global.b%(bits)s [$4 + 48], seen;
    expired:
    mov.u32 status, 1;
    bra join;
    arrived:
    add.u32 i, i, threads;
    bra next;
    join:
    bar.warp.sync 0xffffffff;
    setp.ne.u32 here, status, 0;
    barrier.red.or.pred.aligned any, 0, here;
    selp.u32 $0, 1, 0, any;
}
"""


def _wait(semantic: str, bits: int) -> tl.constexpr:
    return tl.constexpr(_WAIT % {"semantic": semantic, "bits": bits, "bytes": bits // 8})


WAIT_ACQUIRE_64, WAIT_ACQUIRE_32 = _wait("acquire", 64), _wait("acquire", 32)
WAIT_RELAXED_64, WAIT_RELAXED_32 = _wait("relaxed", 64), _wait("relaxed", 32)
