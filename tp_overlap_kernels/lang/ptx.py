"""The assembly behind the words of signal.py, and nowhere else: PTX of sm_90, one block a primitive.

Labels and registers are local to the braces of their block, so that a kernel may hold any number of them.
The barriers are `.aligned`, as those that Triton itself puts: whole warps come to them. Where one lane polls before,
its warp is joined first. (Without `.aligned` ptxas adds a path for lanes that come alone, and compute-sanitizer's
synccheck takes that path for an error.)
"""

import triton.language as tl

NOTIFY = tl.constexpr("""
{
    .reg .pred first;
    .reg .b32 tid;
    barrier.sync.aligned 0;
    mov.u32 tid, %tid.x;
    setp.eq.u32 first, tid, 0;
    @first st.release.sys.global.b64 [$1], $2;
    mov.u32 $0, 0;
}
""")

ENTER = tl.constexpr("""
{
    .reg .pred other;
    .reg .b32 tid, threads, programs;
    .reg .b64 count, last;
    mov.u32 $0, 0;
    mov.u32 tid, %tid.x;
    mov.u32 threads, %ntid.x;
    sub.u32 threads, threads, 1;
    barrier.sync.aligned 0;
    setp.ne.u32 other, tid, threads;
    @other bra entered;
    atom.acq_rel.gpu.global.add.u64 count, [$1 + 8], 1;
    mov.u32 programs, %nctaid.x;
    sub.u32 programs, programs, 1;
    cvt.u64.u32 last, programs;
    setp.ne.u64 other, count, last;
    @other bra entered;
    st.relaxed.gpu.global.b64 [$1 + 8], 0;
    st.relaxed.gpu.global.b64 [$1], $2;
    entered:
}
""")

# Poll until epoch(slot) >= epoch(want). Registers: $0 status; $1 slot, $2 want, $3 timeout_ns, $4 control, $5
# record, $6 packed (op << 48 | rank << 40 | peer << 32 | tile). It looks at the clock after 512 polls and then every
# 1024, so that a short wait does not pay for it. There it also compares headers: a peer that has entered the same epoch
# with another hash makes another call, and would never write the slot we wait for. From 8192 polls on, which is after
# milliseconds, it looks at the abort word there, too: that lies in the host's memory, and when all blocks ask for it
# their other loads wait. Bit 0 of it ends the wait. Bit 8 + peer says that the peer has closed: what it had sent before
# is there by then, so the slot is looked at once more.
_POLL = """
        mov.u32 status, 0;
        mov.u32 polls, 0;
        mov.u64 started, 0;
        shr.u64 wanted, $2, 16;
    poll:
        ld.acquire.sys.global.b64 seen, [$1];
        shr.u64 got, seen, 16;
        setp.ge.s64 here, got, wanted;
        @here bra arrived;
        add.u32 polls, polls, 1;
        and.b32 due, polls, 1023;
        setp.ne.u32 skip, due, 512;
        @skip bra poll;
        ld.relaxed.gpu.global.b64 failed, [$4 + 32];
        setp.ne.s64 gone, failed, 0;
        @gone bra known;
        setp.lt.u32 skip, polls, 8192;
        @skip bra headers;
        ld.relaxed.sys.global.b64 failed, [$5];
        setp.ne.s64 gone, failed, 0;
        @gone bra told;
    headers:
        and.b64 got, $2, 65535;
        setp.eq.u64 skip, got, 0;
        @skip bra clock;
        ld.relaxed.gpu.global.b64 got, [$4 + 64];
        ld.relaxed.gpu.global.b64 code, [$4 + 72];
        and.b64 now, wanted, 1;
        mad.lo.u64 got, now, code, got;
        shr.u64 code, $6, 32;
        and.b64 code, code, 255;
        shl.b64 code, code, 3;
        add.u64 got, got, code;
        ld.relaxed.sys.global.b64 now, [got];
        shr.u64 got, now, 16;
        setp.ne.u64 skip, got, wanted;
        @skip bra clock;
        setp.eq.u64 skip, now, $2;
        @skip bra clock;
        mov.u64 seen, now;
        mov.u32 status, 2;
        bra report;
    clock:
        mov.u64 now, %globaltimer;
        setp.eq.u64 early, started, 0;
        selp.u64 started, now, started, early;
        sub.u64 now, now, started;
        setp.le.u64 early, now, $3;
        setp.eq.u64 endless, $3, 0;
        or.pred early, early, endless;
        @early bra poll;
        mov.u32 status, 1;
        bra report;
    told:
        and.b64 got, failed, 1;
        setp.ne.s64 gone, got, 0;
        @gone bra aborted;
        shr.u64 code, $6, 32;
        and.b64 code, code, 255;
        add.u64 code, code, 8;
        cvt.u32.u64 due, code;
        shr.u64 got, failed, due;
        and.b64 got, got, 1;
        setp.eq.u64 skip, got, 0;
        @skip bra headers;
        ld.acquire.sys.global.b64 seen, [$1];
        shr.u64 got, seen, 16;
        setp.ge.s64 here, got, wanted;
        @here bra arrived;
        bra aborted;
    known:
        mov.u32 status, 3;
        bra leave;
    aborted:
        mov.u32 status, 3;
        bra report;
    arrived:
        setp.ne.u64 late, got, wanted;
        @late bra leave;
        setp.eq.u64 same, seen, $2;
        @same bra leave;
        mov.u32 status, 2;
    report:
        atom.acq_rel.gpu.global.cas.b64 failed, [$4 + 40], 0, 1;
        setp.ne.s64 gone, failed, 0;
        @gone bra mark;
        cvt.u64.u32 code, status;
        st.relaxed.sys.global.b64 [$5 + 16], code;
        shr.u64 code, $6, 48;
        st.relaxed.sys.global.b64 [$5 + 24], code;
        shr.u64 code, $6, 40;
        and.b64 code, code, 255;
        st.relaxed.sys.global.b64 [$5 + 32], code;
        shr.u64 code, $6, 32;
        and.b64 code, code, 255;
        st.relaxed.sys.global.b64 [$5 + 40], code;
        and.b64 code, $6, 4294967295;
        st.relaxed.sys.global.b64 [$5 + 48], code;
        st.relaxed.sys.global.b64 [$5 + 56], $2;
        st.relaxed.sys.global.b64 [$5 + 64], seen;
        st.release.sys.global.b64 [$5 + 8], 2;
    mark:
        st.relaxed.gpu.global.b64 [$4 + 32], 1;
    leave:
"""

_REGISTERS = """
        .reg .pred first, here, skip, gone, early, endless, late, same, any;
        .reg .b32 tid, status, polls, due;
        .reg .b64 seen, got, wanted, failed, started, now, code;
"""

# One thread polls; the barrier's reduction hands every thread the same status (bit by bit, since barrier.red
# reduces a predicate).
WAIT = tl.constexpr(
    "{"
    + _REGISTERS
    + """
        mov.u32 status, 0;
        mov.u32 tid, %tid.x;
        setp.ne.u32 first, tid, 0;
        @first bra join;
"""
    + _POLL
    + """
    join:
        bar.warp.sync 0xffffffff;
        and.b32 due, status, 1;
        setp.ne.u32 here, due, 0;
        barrier.red.or.pred.aligned any, 0, here;
        selp.u32 $0, 1, 0, any;
        and.b32 due, status, 2;
        setp.ne.u32 here, due, 0;
        barrier.red.or.pred.aligned any, 0, here;
        selp.u32 due, 2, 0, any;
        or.b32 $0, $0, due;
    }
"""
)

STAGGER = tl.constexpr("""
{
    .reg .pred late;
    .reg .b64 now, until;
    mov.u64 until, %globaltimer;
    add.u64 until, until, $1;
    asleep:
    mov.u64 now, %globaltimer;
    setp.ge.u64 late, now, until;
    @late bra awake;
    nanosleep.u32 100;
    bra asleep;
    awake:
    mov.u32 $0, 0;
}
""")
