/* Plays recorded programs of kernels, compares what they leave in memory with what was recorded, and writes the verdict
   to the serial port. Records are int64 words; see `record.py`. */
#include <stddef.h>
#include <stdint.h>

typedef void kernel(int64_t args, int64_t item, int64_t worker);
extern kernel *const kernels[];
extern const char records[];
enum { END, PATCH, RUN, EXPECT };

static void out(uint16_t port, uint8_t x) { __asm__ volatile("outb %0, %1" : : "a"(x), "d"(port)); }
static uint8_t in(uint16_t port)
{
    uint8_t x;
    __asm__ volatile("inb %1, %0" : "=a"(x) : "d"(port));
    return x;
}

static void put(char c)
{
    while (!(in(0x3FD) & 0x20)) {}
    out(0x3F8, c);
}

static void begin_serial(void) /* 115200 baud, 8 bits */
{
    out(0x3FB, 0x83), out(0x3F8, 1), out(0x3F9, 0), out(0x3FB, 3), out(0x3FA, 0);
}

static void say(const char *s) { while (*s) put(*s++); }
static void number(uint64_t x, unsigned base)
{
    char digits[24];
    int n = 0;
    do digits[n++] = "0123456789abcdef"[x % base]; while (x /= base);
    while (n) put(digits[--n]);
}

static _Noreturn void stop(void)
{
    while (!(in(0x3FD) & 0x40)) {}
    for (const char *s = "Shutdown"; *s; s++) out(0x8900, *s); /* which Bochs takes for the power switch */
    for (;;) __asm__ volatile("cli; hlt");
}

void exception(uint64_t vector, uint64_t first, uint64_t second)
{
    say("exception "), number(vector, 10), say(" at "), number(first, 16), say(" or "), number(second, 16), say("\nend\n");
    stop();
}

void missing(const char *name)
{
    say("a kernel called "), say(name), say("\nend\n");
    stop();
}

void *memcpy(void *to, const void *from, size_t n)
{
    void *result = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    return result;
}

void *memset(void *to, int byte, size_t n)
{
    void *result = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(byte) : "memory");
    return result;
}

void *memmove(void *to, const void *from, size_t n)
{
    char *a = to;
    const char *b = from;
    if (a <= b || a >= b + n) return memcpy(to, from, n);
    while (n--) a[n] = b[n];
    return to;
}

static void run(const int64_t *program)
{
    for (int64_t step = 0; step < program[0]; step++) {
        const int64_t *one = program + 1 + 3 * step;
        for (int64_t item = 0; item < one[2]; item++) ((kernel *)one[0])((int64_t)(program + one[1]), item, 0);
    }
}

static uint64_t digest(const uint64_t *words, uint64_t count)
{
    uint64_t sum = 0;
    for (uint64_t k = 0; k < count; k++) sum += words[k] * (2 * k + 1);
    return sum;
}

int main(void)
{
    const int64_t *r = (const int64_t *)records;
    char *arena = (char *)r[0];
    int64_t runs = 0, wrong = 0;
    begin_serial();
    memset(arena, 0, r[1]);
    say("begin\n");
    for (r += 2; *r != END;) {
        if (*r == PATCH) { /* offset, bytes, the bytes padded to words */
            memcpy(arena + r[1], r + 3, r[2]);
            r += 3 + (r[2] + 7) / 8;
        } else if (*r == RUN) { /* address of the program, count, then (offset, kernel, recorded value) */
            const int64_t *at = r + 3;
            for (int64_t k = 0; k < r[2]; k++) *(kernel **)(arena + at[3 * k]) = kernels[at[3 * k + 1]];
            run((const int64_t *)r[1]);
            for (int64_t k = 0; k < r[2]; k++) *(int64_t *)(arena + at[3 * k]) = at[3 * k + 2];
            r = at + 3 * r[2];
            runs++;
        } else { /* EXPECT: words of the arena, their digest, number of changed pieces, then those as in PATCH */
            int good = digest((uint64_t *)arena, r[1]) == (uint64_t)r[2];
            int64_t pieces = r[3], differ = 0;
            for (r += 4; pieces--; r += 2 + (r[1] + 7) / 8)
                for (int64_t k = 0; k < r[1]; k++)
                    if (arena[r[0] + k] != ((const char *)(r + 2))[k]) {
                        if (!differ++) say("run "), number(runs - 1, 10), say(" differs at "), number(r[0] + k, 16);
                        arena[r[0] + k] = ((const char *)(r + 2))[k];
                    }
            if (differ) say(" in "), number(differ, 10), say(" bytes\n");
            else if (!good) say("run "), number(runs - 1, 10), say(" wrote beside its outputs\n");
            wrong += differ || !good;
        }
    }
    say("runs "), number(runs, 10), say(" wrong "), number(wrong, 10), say("\nend\n");
    stop();
}
