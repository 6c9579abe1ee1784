// The configuration of a policy whose options are whole numbers: {"name": 12, ...}.
//
// Not a JSON parser: it finds a name in quotes and reads the number behind the colon.
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// Sets `value` to the option's; leaves it alone when the option is absent. False when what stands there is no number.
static inline bool read_option(const char *config, const char *name, uint32_t *value) {
  for (const char *at = strstr(config, name); at != NULL; at = strstr(at + 1, name)) {
    const char *end = at + strlen(name);
    if (at == config || at[-1] != '"' || end[0] != '"') continue;
    const char *number = end + 1 + strspn(end + 1, " \t\r\n:");
    if (number[0] < '0' || number[0] > '9') return false;
    *value = (uint32_t)strtoul(number, NULL, 10);
    return true;
  }
  return true;
}
