#include "fuzz.h"
#include "home.h"
#include "host.h"

struct av_home *fuzz_home(void)
{
    static struct av_home *home;
    int error;

    if (home == NULL)
        home = av_home_create(&error);
    CHECK(home != NULL);
    return home;
}
