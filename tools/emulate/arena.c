/* A NumPy allocator (NEP 49) that takes all memory from one place at a fixed address, so that it can be copied whole. */
#define _GNU_SOURCE
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

enum { CLASSES = 40 };
static char *base, *next;
static void *unused[CLASSES]; /* by size: powers of two from 64 */

static int class_of(size_t n)
{
    int k = 0;
    while (((size_t)64 << k) < n) k++;
    return k;
}

/* The class of a block stands in the 64 bytes before it. */
static void *take(void *context, size_t n)
{
    int k = class_of(n);
    char *found = unused[k];
    if (found) unused[k] = *(void **)found;
    else found = next + 64, next = found + ((size_t)64 << k), found[-64] = k;
    return found;
}

static void *take_zeros(void *context, size_t n, size_t size) { return memset(take(context, n * size), 0, n * size); }

static void give(void *context, void *at, size_t n)
{
    if (!at) return;
    int k = ((char *)at)[-64];
    *(void **)at = unused[k], unused[k] = at;
}

static void *change(void *context, void *at, size_t n)
{
    size_t room = at ? (size_t)64 << ((char *)at)[-64] : 0;
    if (room >= n && at) return at;
    void *found = take(context, n);
    if (at) memcpy(found, at, room), give(context, at, room);
    return found;
}

struct handler {
    char name[127];
    uint8_t version;
    void *context;
    void *(*malloc)(void *, size_t);
    void *(*calloc)(void *, size_t, size_t);
    void *(*realloc)(void *, void *, size_t);
    void (*free)(void *, void *, size_t);
};
struct handler handler = {"arena", 1, 0, take, take_zeros, change, give};

int begin(uint64_t address, uint64_t nbytes)
{
    base = next = mmap((void *)address, nbytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
    return base == (char *)address;
}

uint64_t used(void) { return next - base; }
