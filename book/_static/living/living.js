/* made by book/live/build.mjs from sources d56cb964b750accc6c170c846033d0065b6b9cb39206c67f6e6c917b4f69760c */
"use strict";(()=>{console.log(18256,1348);})();
